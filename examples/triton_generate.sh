#!/usr/bin/env bash
# The Triton server's HTTP routes with curl: one answer, then a stream of server-sent events.
# bash examples/triton_generate.sh [HOST:PORT]    (a server started with --http)
set -euo pipefail
url=http://${1:-127.0.0.1:33338}/v2/models/tritonmind

curl -fsS "$url/generate" -d '{"text_input": "The capital of France is", "max_tokens": 8, "temperature": 0}'
echo
curl -fsSN "$url/generate_stream" -d '{"text_input": "The capital of France is", "max_tokens": 8, "temperature": 0, "stream": true}'
