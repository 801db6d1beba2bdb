#!/bin/sh
# Packs a directory into a tar.gz: take.sh DIRECTORY ARCHIVE LEVEL
#
# All that a step's program has to keep, in shell: outputs and progress are lines of JSON that are appended to files,
# a failure is a sentence with a code and an exit code, what is written appears whole or not at all, and SIGTERM ends it.
set -eu
of=$1 to=$2 level=$3

tell() { # tell FILE FORMAT [VALUE...]: append a line to /outrider/FILE
    file=$1
    shift
    # shellcheck disable=SC2059 # the formats are ours
    printf "$@" >> "/outrider/$file"
}

quoted() { # the text as it stands within a JSON string
    printf '%s' "$1" | tr -d '\000-\037' | sed 's/[\\"]/\\&/g'
}

fail() { # fail EXIT_CODE CODE SENTENCE: 75 asks for another try, any other code says that it would change nothing
    tell progress '{"error": "%s", "code": "%s"}\n' "$(quoted "$3")" "$2"
    echo "error: $3" >&2
    exit "$1"
}

size() { stat -c %s "$part" 2> /dev/null || echo 0; }

[ -d "$of" ] || fail 1 not_a_directory "$of is not a directory"

part=$(dirname "$to")/.$(basename "$to").part
errors=/tmp/errors
packing=
# In the background a program does not hear the signal that the script gets.
trap 'rm -f "$part"' EXIT
trap '[ -z "$packing" ] || kill "$packing" 2> /dev/null; exit 143' TERM

(: > "$part") 2> /dev/null || fail 1 not_writable "$to can't be written: there is no such directory, or it is read-only"

# Sorted, and without the names of users that only this node knows: the same files make the same archive.
tar --create --file "$part" --use-compress-program "gzip -n -$level" --directory "$of" \
    --sort name --owner 0 --group 0 --numeric-owner . 2> "$errors" &
packing=$!
while kill -0 "$packing" 2> /dev/null; do
    tell progress '{"done": %d, "total": null, "unit": "bytes"}\n' "$(size)"
    sleep 0.5 &
    wait $! || true
done
status=0
wait "$packing" || status=$?
packing=
case $status in
    0) ;;
    1) fail 75 changed "a file of $of was changed while it was read: $(tail -n 1 "$errors")" ;;
    *) fail 1 not_packed "$of can't be packed: $(tail -n 1 "$errors")" ;;
esac

mv "$part" "$to"
bytes=$(stat -c %s "$to")
tell progress '{"done": %d, "total": %d, "unit": "bytes"}\n' "$bytes" "$bytes"
tell outputs '{"bytes": %d, "sha256": "%s"}\n' "$bytes" "$(sha256sum "$to" | cut -d ' ' -f 1)"
echo "$of is packed into $to ($bytes bytes)"
