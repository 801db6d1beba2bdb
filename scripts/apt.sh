# Sourced; whoever does has `say SENTENCE`.

# apt_install PACKAGE… -- OPTIONAL…: from this distribution's packages; of the optional ones, those that it has. Where that
# fails, the reason is shown.
apt_install() {
  local packages=() out each
  while [ "$1" != -- ]; do packages+=("$1"); shift; done
  shift
  say "installing ${packages[*]} from this distribution's packages"
  out=$(mktemp)
  export DEBIAN_FRONTEND=noninteractive
  if ! { apt-get update -q && {
    for each; do
      if apt-cache show "$each" >/dev/null 2>&1; then packages+=("$each"); fi
    done
    apt-get install -yq --no-install-recommends "${packages[@]}"
  }; } >"$out" 2>&1; then
    tail -n 15 "$out" >&2
    rm -f "$out"
    return 1
  fi
  rm -f "$out"
}
