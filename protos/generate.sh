#!/usr/bin/env bash
# Makes topq_dist/v1 from protos/; tests/v1/test_stubs.py fails where the two have drifted apart.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:-$root}
bin=$root/.venv/bin
mkdir -p "$out/topq_dist/v1"
PATH=$bin:$PATH "$bin/python" -m grpc_tools.protoc -I "$root/protos" \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    topq_dist/v1/parameter_server.proto
