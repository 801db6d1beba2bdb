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
    package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    out=$(mktemp)
    { $sudo apt-get update -q && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -yq "$package"; } >"$out" 2>&1 || {
        tail -n 15 "$out" >&2
        rm -f "$out"
        echo "error: $package could not be installed; the reason stands above" >&2
        exit 1
    }
    rm -f "$out"
fi
echo "==> making the virtual environment .venv" >&2
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'
set -- -e '.[all]' -e stepkit
for plugin in plugins/*/; do set -- "$@" -e "$plugin"; done
# What sudo runs later must not leave byte code of root's in here: nobody else could bring the environment up to date.
[ "$(id -u)" = 0 ] || set -- --compile-bytecode "$@"
.venv/bin/uv pip install --quiet --python .venv/bin/python "$@" --group dev
echo "$wanted" > "$stamp"
