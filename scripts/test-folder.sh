# Sourced: where tests have their files. In memory where there is plenty of it, and then nothing stays; else, or where
# TMPDIR says so, it is as always.
if [ -z "${TMPDIR:-}" ] && [ "$(awk '/^MemAvailable/ {print $2}' /proc/meminfo)" -gt 8000000 ] &&
  [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ]; then
  TMPDIR=$(mktemp -d /dev/shm/outrider-tests.XXXXXX)
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
