#!/bin/sh
# Makes .venv with everything that Outrider, its plugins and its tests need; does nothing when it is up to date.
set -eu
cd "$(dirname "$0")/.."

stamp=.venv/.outrider-stamp
wanted=$(cat scripts/venv.sh pyproject.toml stepkit/pyproject.toml plugins/*/pyproject.toml | sha256sum | cut -d' ' -f1)
[ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ] || exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "error: Outrider needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1 || echo missing)" >&2
    exit 1
}
# Debian and Ubuntu ship Python without ensurepip, which venv needs.
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
    echo "==> installing python3-venv" >&2
    sudo=; [ "$(id -u)" = 0 ] || sudo=sudo
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >/dev/null
fi
echo "==> making the virtual environment .venv" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
set -- -e '.[all]' -e stepkit
for plugin in plugins/*/; do set -- "$@" -e "$plugin"; done
.venv/bin/uv pip install --quiet --python .venv/bin/python "$@" --group dev
echo "$wanted" > "$stamp"
