#!/usr/bin/env bash
# Runs the tests, in a virtual environment that it makes when there is none.
# usage: bash tests/run.sh [PYTEST OPTIONS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${TRITONMIND_VENV:-.venv}
bash tools/setup_venv.sh "$venv" dev serve
# Files of tests are spread over processes, the long ones first, as tests/conftest.py orders them; -n 0 for one process.
exec "$venv/bin/python" -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
