#!/usr/bin/env bash
# Serves a workspace on gRPC 33337. The same file lies in the checkout, where it also installs and converts the demo model,
# and in each workspace, where it serves that workspace.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here model=tritonmind container=tritonmind stop_seconds=9

usage() {
  cat <<EOF
usage: bash service_docker_up.sh [OPTIONS] [WORKSPACE]

Serves WORKSPACE, a folder that \`tritonmind convert\` wrote. Left out: the workspace this script lies in; in the checkout,
the demo model, which is installed and converted first. Without --docker or --embedded it takes the container when there
is a Docker engine and an NVIDIA GPU, else the Triton server of the nvidia-pytriton wheel.

  --docker               serve from the container image
  --embedded             serve from the embedded server
  --grpc-port PORT       gRPC port (default 33337)
  --grpc-address ADDR    address to listen on (default 127.0.0.1)
  --http [PORT]          serve HTTP too (default port 33338)
  --metrics [PORT]       serve metrics too (default port 33339)
  --venv DIR             virtual environment that has, or in the checkout gets, tritonmind
  --torch-index URL      package index to install PyTorch from (checkout only)
  --image NAME           container image (default: the one of the workspace's version)
  --lib-dir DIR          folder of a backend's model.py to serve with instead of the installed one
  --log-file FILE        where the server's log goes
  -h, --help             this text

In a workspace the interpreter is found by --venv, \$TRITONMIND_VENV, the active virtual environment, \`tritonmind\` on
PATH, or a .venv in a parent folder.
EOF
}

say() { printf '%s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
bad_usage() {
  printf 'error: %s (see --help)\n' "$*" >&2
  exit 2
}

is_workspace() { [ -f "$1/model_repository/$model/1/weights/index.json" ]; }
check_workspace() {
  is_workspace "$workspace" || die "$workspace is no workspace: model_repository/$model/1/weights/index.json is missing; make one with \`tritonmind convert\`"
}
in_checkout() { [ -f "$here/setup.cfg" ] && [ -f "$here/tools/setup_venv.sh" ]; }
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
has_docker() { command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1; }

mode='' grpc_port=33337 grpc_address=127.0.0.1 http='' metrics='' venv='' torch_index='' image='' lib_dir='' log_file=''
workspace=''

is_port() { [[ $1 =~ ^[0-9]{1,5}$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 65535 ]; }

parse_options() {
  local option value attached
  while [ $# -gt 0 ]; do
    option=$1
    attached=no
    shift
    case $option in
      --*=*) attached=yes; set -- "${option#*=}" "$@"; option=${option%%=*} ;;
    esac
    case $option in --*) option=${option//_/-} ;; esac
    case $attached$option in yes--help | yes--docker | yes--embedded) bad_usage "$option takes no value, got '$1'" ;; esac
    case $option in
      -h | --help) usage; exit 0 ;;
      --docker | --embedded)
        [ -z "$mode" ] || [ "$mode" = "${option#--}" ] || bad_usage '--docker and --embedded exclude each other'
        mode=${option#--} ;;
      --http | --metrics)
        if [ "$option" = --http ]; then value=33338; else value=33339; fi
        if [ $# -gt 0 ] && is_port "$1"; then
          value=$1
          shift
        elif [ "$attached" = yes ]; then
          bad_usage "$option=$1 is no port: give a number from 1 to 65535"
        fi
        printf -v "${option#--}" '%s' "$value" ;;
      --grpc-port | --grpc-address | --venv | --torch-index | --image | --lib-dir | --log-file)
        [ $# -gt 0 ] || bad_usage "$option needs a value"
        value=$1
        shift
        option=${option#--}
        printf -v "${option//-/_}" '%s' "$value" ;;
      -*) bad_usage "unknown option $option" ;;
      *)
        [ -z "$workspace" ] || bad_usage "one workspace at most: $workspace and $option"
        workspace=$option ;;
    esac
  done
  is_port "$grpc_port" || bad_usage "--grpc-port=$grpc_port is no port: give a number from 1 to 65535"
  [ -z "$lib_dir" ] || [ -f "$lib_dir/model.py" ] || bad_usage "--lib-dir=$lib_dir holds no model.py"
}

choose_mode() {
  if [ -n "$mode" ]; then return; fi
  mode=embedded
  if ! has_gpu; then
    say 'No NVIDIA GPU answers (nvidia-smi): serving with the embedded server on the CPU.'
  elif ! has_docker; then
    say 'No Docker engine answers (docker info): serving with the embedded server.'
  else
    mode=docker
  fi
}

# In the checkout: install, and make the demo workspace when none was named.
prepare_checkout() {
  local extras=(gguf tokenizers) index=() demo
  venv=${venv:-${TRITONMIND_VENV:-$here/.venv}}
  if [ "$mode" = embedded ]; then extras+=(serve); fi
  if [ -n "$torch_index" ]; then index=(--torch-index "$torch_index"); fi
  bash "$here/tools/setup_venv.sh" "${index[@]}" "$venv" "${extras[@]}"
  if [ -n "$workspace" ]; then return; fi
  workspace=$here/workspace
  if is_workspace "$workspace"; then return; fi
  demo=$("$venv/bin/python" -m tritonmind_tools.demo)
  say "Converting the demo model into $workspace"
  "$venv/bin/tritonmind" convert smollm2 "$demo" --weight-type fp32 --dst-path "$workspace"
}

# Prints the `tritonmind` command that serves a workspace outside the checkout.
find_command() {
  local folder
  if [ -n "$venv" ]; then
    [ -x "$venv/bin/tritonmind" ] || die "--venv=$venv holds no bin/tritonmind: pip install 'tritonmind[serve]' into it"
    say "$venv/bin/tritonmind"
    return
  fi
  for folder in "${TRITONMIND_VENV-}" "${VIRTUAL_ENV-}"; do
    if [ -n "$folder" ] && [ -x "$folder/bin/tritonmind" ]; then say "$folder/bin/tritonmind"; return; fi
  done
  if command -v tritonmind; then return; fi
  folder=$(cd "$workspace" && pwd)
  while :; do
    if [ -x "$folder/.venv/bin/tritonmind" ]; then say "$folder/.venv/bin/tritonmind"; return; fi
    if [ "$folder" = / ]; then break; fi
    folder=$(dirname "$folder")
  done
  die "no Python with tritonmind was found. Looked at --venv, \$TRITONMIND_VENV, the active virtual environment, PATH and
.venv in $workspace and above it. Install it: pip install 'tritonmind[serve]', or name its environment with --venv."
}

serve_embedded() {
  local command arguments
  if in_checkout; then command=$venv/bin/tritonmind; else command=$(find_command); fi
  arguments=(serve triton_server "$workspace" --grpc-port "$grpc_port" --grpc-address "$grpc_address")
  if [ -n "$http" ]; then arguments+=(--http "$http"); fi
  if [ -n "$metrics" ]; then arguments+=(--metrics "$metrics"); fi
  if [ -n "$lib_dir" ]; then arguments+=(--lib-dir "$lib_dir"); fi
  if [ -n "$log_file" ]; then arguments+=(--log-file "$log_file"); fi
  exec "$command" "${arguments[@]}"
}

# GPU list for docker run: as many as the workspace was split for.
gpu_devices() {
  local config=$workspace/model_repository/$model/1/weights/config.ini ranks
  ranks=$(sed -n 's/^ *tensor_para_size *= *\([0-9]*\).*/\1/p' "$config")
  say "\"device=$(seq -s, 0 $((${ranks:-1} - 1)))\""
}

serve_docker() {
  local arguments flags facts=$workspace/model_repository/$model/1/weights/index.json log
  log=${log_file:-$(mktemp --suffix=.log)}
  command -v docker >/dev/null || die 'docker is not installed; serve without it by --embedded'
  has_docker || die 'the Docker engine does not answer (docker info): start it, or serve without it by --embedded'
  image=${image:-$(sed -n 's/.*"image": *"\([^"]*\)".*/\1/p' "$facts" | head -n 1)}
  docker image inspect "$image" >/dev/null 2>&1 ||
    die "the image $image is not here; build it in tritonmind's checkout: docker build -t $image ."
  # --rm: a new container each time, without the last one's drain file. --sig-proxy: no signal overtakes stop_docker's drain.
  arguments=(--rm --sig-proxy=false --name "$container" --shm-size 16g --stop-timeout "$stop_seconds"
    -v "$(cd "$workspace" && pwd):/workspace:ro" -p "$grpc_address:$grpc_port:33337")
  flags=(--model-repository=/workspace/model_repository --allow-grpc=1 --grpc-port=33337 --allow-http=0 --allow-metrics=0
    --exit-timeout-secs=$((stop_seconds - 1)))
  if has_gpu; then arguments+=(--gpus "$(gpu_devices)"); else say 'No NVIDIA GPU answers: the container runs on the CPU.'; fi
  if [ -n "$http" ]; then arguments+=(-p "$grpc_address:$http:33338"); flags+=(--allow-http=1 --http-port=33338); fi
  if [ -n "$metrics" ]; then arguments+=(-p "$grpc_address:$metrics:33339"); flags+=(--allow-metrics=1 --metrics-port=33339); fi
  if [ -n "$lib_dir" ]; then arguments+=(-v "$(cd "$lib_dir" && pwd):/opt/tritonserver/backends/$model:ro"); fi
  say "Starting the container $container from $image (log: $log)"
  trap stop_docker INT TERM HUP
  docker run "${arguments[@]}" "$image" tritonserver "${flags[@]}" >"$log" 2>&1 &
  watch_docker $! "$log"
}

stop_docker() {
  trap '' INT TERM HUP
  say "Stopping the container $container"
  # The backend then ends its requests, which the server, told to exit, would wait for.
  # shellcheck disable=SC2016  # the variable is the container's
  timeout 2 docker exec "$container" sh -c 'touch "$TRITONMIND_DRAIN_FILE"' >/dev/null 2>&1 || true
  docker stop -t "$stop_seconds" "$container" >/dev/null 2>&1 || true
  exit 0
}

# Tells when the container's server is ready; the server opens its gRPC port after its models are loaded.
watch_docker() {
  local job=$1 log=$2 announced=no
  while kill -0 "$job" 2>/dev/null; do
    if [ "$announced" = no ] && grep -q 'Started GRPCInferenceService' "$log"; then
      announced=yes
      say 'Ready. Try it from another terminal:'
      say "  tritonmind serve triton_client $grpc_address:$grpc_port"
    fi
    sleep 0.5 &
    wait $! || true
  done
  grep -m 1 -oE "failed to load '[^']*' version [^\"]*|port is already allocated|[Ee]rror.*" "$log" >&2 || tail -n 2 "$log" >&2
  die "the container ended; its log is $log"
}

parse_options "$@"
if [ -n "$workspace" ]; then check_workspace; fi
choose_mode
if in_checkout; then
  prepare_checkout
elif [ -z "$workspace" ]; then
  workspace=$here
fi
check_workspace
"serve_$mode"
