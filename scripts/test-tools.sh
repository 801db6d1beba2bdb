#!/usr/bin/env bash
# What some tests compare with, or build their world of: installed from this distribution's packages where it is missing.
# Where that can't be done it is said, and the tests that need it are skipped.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/apt.sh"

packages=()
while read -r program package; do
  PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || packages+=("$package")
done <<'EOF'
7zz 7zip
bzip2 bzip2
xz xz-utils
ip iproute2
iptables iptables
EOF
[ ${#packages[@]} -gt 0 ] || exit 0

say() { printf 'test tools: %s\n' "$*" >&2; }
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  say "missing here: ${packages[*]}; tests that need them are skipped"
  exit 0
fi
# Newer releases have 7zz in a package of its own.
apt_install "${packages[@]}" -- 7zip-standalone ||
  say "${packages[*]} could not be installed; the reason stands above, and tests that need them are skipped"
