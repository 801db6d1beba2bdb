#!/bin/sh
# Generates outrider/v1 from proto/; with --check it compares instead and fails when they differ.
#
# The toolchain is old and pinned on purpose: generated code demands at least the protobuf and grpcio that
# made it, and step plugins share the agent's environment.
set -eu
cd "$(dirname "$0")/.."

tools=.venv-proto
if [ ! -x $tools/bin/protoc-gen-mypy_grpc ]; then
    .venv/bin/uv venv --quiet --python .venv/bin/python $tools
    .venv/bin/uv pip install --quiet --python $tools/bin/python 'grpcio-tools==1.62.3' 'mypy-protobuf==3.6.0' 'setuptools<70'
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
PATH="$PWD/$tools/bin:$PATH" $tools/bin/python -W ignore -m grpc_tools.protoc -I proto \
    --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
    proto/outrider/v1/*.proto
rm -f "$out"/outrider/v1/types_pb2_grpc.py*   # it has no service

if [ "${1:-}" = --check ]; then
    for file in "$out"/outrider/v1/*; do
        cmp -s "$file" "outrider/v1/$(basename "$file")" || {
            echo "error: outrider/v1/$(basename "$file") is not what proto/ generates; run 'make protos'" >&2
            exit 1
        }
    done
else
    cp "$out"/outrider/v1/* outrider/v1/
fi
