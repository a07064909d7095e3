#!/usr/bin/env bash
# The entry point of the container. Runs ComfyUI, restarts it when it dies, and runs one of these beside it: a worker of
# RunPod, a worker of a gateway's queue, or the gateway. docs/how-to/deploy.md describes the variables and exit codes.
# shellcheck disable=SC2329  # functions that only `trap` calls
set -euo pipefail

readonly EXIT_NO_GPU=1 EXIT_CONFIG=2 EXIT_COMFYUI=3
readonly MAX_BACKOFF_S=30 STABLE_S=60 STOP_GRACE_S=10 GIVE_UP_GRACE_S=60
readonly LOG_BYTES=1048576 # kept of ComfyUI's log, from which the worker quotes

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
readonly here

say() { printf 'start.sh: %s\n' "$*" >&2; }

fail() { # EXIT_CODE SENTENCE
  local code=$1
  shift
  say "$*"
  exit "$code"
}

is_true() { [[ ${1,,} =~ ^(1|true|yes|on)$ ]]; }

# --- settings -------------------------------------------------------------------------------------------------

check_bash() {
  ((BASH_VERSINFO[0] >= 5)) || fail "$EXIT_CONFIG" "bash 5 or newer is needed, this one is $BASH_VERSION."
}

check_port() { # NAME VALUE
  if ! [[ $2 =~ ^[0-9]{1,5}$ ]] || ((10#$2 < 1 || 10#$2 > 65535)); then
    fail "$EXIT_CONFIG" "$1 must be a port number from 1 to 65535, not '$2'."
  fi
}

absolute() { # PATH, relative to the working directory
  [[ $1 == /* ]] && printf '%s' "$1" || printf '%s/%s' "$PWD" "$1"
}

program() { # NAME of a program in PATH, or a path
  [[ $1 == */* ]] && absolute "$1" || printf '%s' "$1"
}

find_worker_python() {
  local candidate
  for candidate in /opt/worker/bin/python "$here/.venv/bin/python"; do
    [[ ! -x $candidate ]] || { printf '%s' "$candidate" && return; }
  done
  printf 'python3'
}

find_comfyui_python() {
  local candidate
  for candidate in "$comfyui_dir/../venv/bin/python" "$comfyui_dir/.venv/bin/python" "$comfyui_dir/venv/bin/python"; do
    [[ ! -x $candidate ]] || { printf '%s' "$candidate" && return; }
  done
  fail "$EXIT_CONFIG" "There is no virtual environment beside or in $comfyui_dir; set COMFYUI_PYTHON to the python" \
    "that ComfyUI's requirements are installed for."
}

# Sets the variables of .env that the environment does not have. The worker's Python reads the file, as it does without
# start.sh.
read_env_file() {
  local python assignments
  [[ -n ${ENV_FILE-.env} && (-n ${ENV_FILE:-} || -f .env) ]] || return 0
  python=$(program "${WORKER_PYTHON:-$(find_worker_python)}")
  assignments=$(env "$(python_path)" "$python" -m comfy_worker.env_file) ||
    fail "$EXIT_CONFIG" "The settings in ${ENV_FILE-.env} cannot be read by $python."
  eval "$assignments"
  export ENV_FILE= # so that the worker, which runs in another folder, reads no other file
}

read_worker_settings() {
  worker_python=$(program "${WORKER_PYTHON:-$(find_worker_python)}")
  command -v -- "$worker_python" >/dev/null ||
    fail "$EXIT_CONFIG" "The worker's python '$worker_python' cannot be run; set WORKER_PYTHON to one that can."
  if is_true "${SERVE_API_LOCALLY:-false}" && is_true "${RUN_CELERY_WORKER:-false}"; then
    fail "$EXIT_CONFIG" "SERVE_API_LOCALLY and RUN_CELERY_WORKER are both true, but a container runs the gateway or a" \
      "worker of one; set one of them to false."
  elif is_true "${SERVE_API_LOCALLY:-false}"; then
    build_gateway_command
  elif is_true "${RUN_CELERY_WORKER:-false}"; then
    build_celery_command
  else
    build_handler_command
  fi
}

build_handler_command() {
  local handler
  handler=$(absolute "${WORKER_HANDLER:-$here/handler.py}")
  [[ -f $handler ]] || fail "$EXIT_CONFIG" "There is no worker at $handler; WORKER_HANDLER says where."
  worker_command=("$worker_python" "$handler")
}

build_gateway_command() {
  if [[ -n ${API_PORT:-} ]]; then
    check_port API_PORT "$API_PORT"
  else
    check_port PORT "${PORT:-8000}"
  fi
  # The loopback address of a container cannot be reached from outside.
  worker_command=(env "API_HOST=${API_HOST:-0.0.0.0}" "$(data_dir)" "$(python_path)" "$worker_python"
    -m comfy_worker serve)
}

build_celery_command() {
  worker_command=(env "$(data_dir)" "$(python_path)" "$worker_python" -m comfy_worker worker)
}

data_dir() {
  printf 'DATA_DIR=%s' "$(absolute "${DATA_DIR:-$(find_data_dir)}")"
}

python_path() { # handler.py adds the folder `src` itself
  printf 'PYTHONPATH=%s/src%s' "$here" "${PYTHONPATH:+:$PYTHONPATH}"
}

runs_jobs_elsewhere() { # a gateway whose jobs run on other machines
  local engine=${ENGINE:-local}
  is_true "${SERVE_API_LOCALLY:-false}" && [[ ${engine,,} =~ ^(celery|runpod)$ ]]
}

# On the volume, if there is one, because all other files are lost with the container.
find_data_dir() {
  local volume
  for volume in /workspace /runpod-volume; do
    ! mountpoint -q "$volume" 2>/dev/null || { printf '%s/comfy-worker' "$volume" && return; }
  done
  printf 'data'
}

# Sets `comfyui`: `emulator` and `installed` are started here; `elsewhere` is not, or is not needed.
choose_comfyui() {
  comfyui_port=${COMFYUI_PORT:-8188}
  check_port COMFYUI_PORT "$comfyui_port"
  comfyui_dir=$(absolute "${COMFYUI_DIR:-/opt/comfyui/ComfyUI}")
  if runs_jobs_elsewhere; then
    comfyui=elsewhere
  elif is_true "${COMFY_EMULATOR:-false}"; then
    comfyui=emulator
  elif [[ ${COMFYUI_DIR:-} != none && -f $comfyui_dir/main.py ]]; then
    comfyui=installed
  elif [[ -n ${COMFYUI_DIR:-} && $COMFYUI_DIR != none ]]; then
    fail "$EXIT_CONFIG" "COMFYUI_DIR is $COMFYUI_DIR, but there is no main.py of ComfyUI in it."
  elif [[ -n ${COMFYUI_URL:-} ]]; then
    comfyui=elsewhere
  else
    fail "$EXIT_CONFIG" "No ComfyUI is installed here: set COMFYUI_DIR to the folder with its main.py, COMFYUI_URL to" \
      "one that runs elsewhere, or COMFY_EMULATOR=true to try the worker without one."
  fi
}

check_gpu() {
  [[ $(nvidia-smi -L 2>/dev/null) == *"GPU "* ]] ||
    fail "$EXIT_NO_GPU" "nvidia-smi finds no GPU: start the container with one (docker run --gpus all, or a GPU for" \
      "the RunPod endpoint or pod), or set COMFY_CPU=true to go without."
  # nvidia-smi also works on a host whose driver can no longer open CUDA. A call of the driver shows that, in a
  # fraction of the time of `import torch`.
  "$worker_python" -I -S -c '
import ctypes, sys
try:
    sys.exit(0 if ctypes.CDLL("libcuda.so.1").cuInit(0) == 0 else 1)
except (OSError, AttributeError):
    sys.exit(1)
' || fail "$EXIT_NO_GPU" "There is a GPU, but CUDA does not start on it: take a host with a working driver, or set" \
    "COMFY_CPU=true to go without."
}

# Several containers on one machine see all of its GPUs. Each takes the first one that is not locked, until the last
# process that holds the lock file open ends: this shell or one of its children.
take_gpu() {
  local gpu gpus gpu_lock
  [[ -d $GPU_LOCK_DIR && -w $GPU_LOCK_DIR ]] ||
    fail "$EXIT_CONFIG" "GPU_LOCK_DIR is $GPU_LOCK_DIR, but that is no folder that can be written to."
  gpus=$(nvidia-smi --query-gpu=uuid --format=csv,noheader)
  for gpu in $gpus; do
    exec {gpu_lock}>>"$GPU_LOCK_DIR/$gpu.lock"
    if flock --nonblock "$gpu_lock"; then
      export CUDA_VISIBLE_DEVICES=$gpu
      say "This worker has the GPU $gpu."
      return
    fi
    exec {gpu_lock}>&-
  done
  fail "$EXIT_NO_GPU" "Every GPU of this machine belongs to another worker: run at most $(wc -w <<<"$gpus") here."
}

read_log_level() {
  log_level=${COMFY_LOG_LEVEL:-INFO}
  log_level=${log_level^^}
  [[ $log_level =~ ^(DEBUG|INFO|WARNING|ERROR|CRITICAL)$ ]] ||
    fail "$EXIT_CONFIG" "COMFY_LOG_LEVEL must be DEBUG, INFO, WARNING, ERROR or CRITICAL, not '$COMFY_LOG_LEVEL'."
}

find_tcmalloc() {
  local ldconfig
  ldconfig=$(PATH=$PATH:/usr/sbin:/sbin command -v ldconfig) || return 0
  "$ldconfig" -p | sed -n 's/^[[:space:]]*libtcmalloc\(_minimal\)\{0,1\}\.so\.[0-9]* .*=> //p' | sed -n 1p
}

build_emulator_command() {
  comfyui_workdir=$here
  comfyui_base=$run_dir/comfyui
  mkdir -p "$comfyui_base"
  comfyui_command=("$worker_python" -m comfy_emulator --listen "${COMFYUI_LISTEN:-127.0.0.1}"
    --port "$comfyui_port" --base-directory "$comfyui_base" --max-upload-size "${INPUT_MAX_MB:-1024}")
}

build_comfyui_command() {
  local tcmalloc python extra=()
  python=${COMFYUI_PYTHON:-$(find_comfyui_python)}
  python=$(program "$python")
  command -v -- "$python" >/dev/null ||
    fail "$EXIT_CONFIG" "ComfyUI's python '$python' cannot be run; set COMFYUI_PYTHON to that of its environment."
  tcmalloc=$(find_tcmalloc)
  comfyui_workdir=$comfyui_dir
  comfyui_command=(env PYTHONUNBUFFERED=1)
  [[ -z $tcmalloc ]] || comfyui_command+=("LD_PRELOAD=$tcmalloc${LD_PRELOAD:+:$LD_PRELOAD}")
  comfyui_command+=("$python" main.py --listen "${COMFYUI_LISTEN:-127.0.0.1}" --port "$comfyui_port"
    --verbose "$log_level"
    --max-upload-size "${INPUT_MAX_MB:-1024}") # the worker's limit
  is_true "${COMFY_CPU:-false}" && comfyui_command+=(--cpu)
  is_true "${KEEP_METADATA:-false}" || comfyui_command+=(--disable-metadata)
  read -r -d '' -a extra <<<"${COMFYUI_ARGS:-}" || true # read ends with 1 at the end of its text
  comfyui_command+=("${extra[@]}")                      # last, so that they override the others
  # The worker removes jobs' files there; if COMFYUI_ARGS names other folders, COMFYUI_BASE_DIRECTORY must be set.
  [[ " ${extra[*]:-} " == *-directory* ]] || comfyui_base=$comfyui_dir
}

read_max_deaths() {
  max_deaths=${COMFYUI_MAX_DEATHS:-5}
  [[ $max_deaths =~ ^[1-9][0-9]{0,3}$ ]] ||
    fail "$EXIT_CONFIG" "COMFYUI_MAX_DEATHS must be a number from 1 to 9999, not '$max_deaths'."
}

# --- ComfyUI --------------------------------------------------------------------------------------------------

keep_log_small() {
  [[ -f $COMFYUI_LOG_FILE ]] && (($(stat -c %s "$COMFYUI_LOG_FILE") > LOG_BYTES)) || return 0
  tail -c "$LOG_BYTES" "$COMFYUI_LOG_FILE" >"$COMFYUI_LOG_FILE.tail"
  cat "$COMFYUI_LOG_FILE.tail" >"$COMFYUI_LOG_FILE" # in place, because tee appends to the same file
  rm -f "$COMFYUI_LOG_FILE.tail"
}

keep_log_small_always() {
  while sleep 60; do keep_log_small; done
}

# Starts a background job in a process group of its own and sets job_pid. Ctrl-C then reaches only this shell, which
# passes it on. Without job control (set -m), the job would start with SIGINT ignored.
start_job() { # COMMAND ARGUMENT…
  set -m
  "$@" &
  job_pid=$!
  set +m
}

# Returns the exit status of a child, even if signals interrupt the wait.
wait_for() { # PID
  local status ended
  while :; do
    interrupted=no ended=no status=0
    kill -0 "$1" 2>/dev/null || ended=yes
    wait "$1" 2>/dev/null || status=$? # without bash's message about a child that a signal ended
    # After two signals at once, bash may also end the next wait with the code of the signal while the child lives.
    [[ $interrupted == yes || ($status -gt 128 && $ended == no) ]] || return "$status"
  done
}

kill_group() { # PID of the group's leader
  kill -KILL -- "-$1" 2>/dev/null || true
}

end_job() { # PID
  kill_group "$1"
  wait_for "$1" || true
}

# Waits until the job has executed its program: the shell that it is before loses signals.
wait_for_program() { # PID
  while [[ -e /proc/$1 ]] && cmp -s "/proc/$1/cmdline" "/proc/$BASHPID/cmdline"; do sleep 0.01; done
}

become_comfyui() {
  cd -- "$comfyui_workdir"
  printf '%s\n' "$BASHPID" >"$COMFYUI_PID_FILE.new"
  mv -f "$COMFYUI_PID_FILE.new" "$COMFYUI_PID_FILE"
  exec "${comfyui_command[@]}" </dev/null >&"$log_pipe" 2>&1 {log_pipe}>&-
}

# Runs ComfyUI once and sets comfyui_status. The pid file exists exactly as long as the process.
run_comfyui() {
  start_job become_comfyui
  wait_for_program "$job_pid"
  comfyui_pid=$job_pid
  [[ $stopping == no ]] || on_stop # the signal came while ComfyUI was started
  comfyui_status=0
  wait_for "$comfyui_pid" || comfyui_status=$?
  rm -f "$COMFYUI_PID_FILE"
  kill_group "$comfyui_pid" # processes that custom nodes started and that may use GPU memory
  comfyui_pid=
}

# Traps must not start processes here: bash may lose track of the child that it is waiting for.
on_stop() {
  stopping=yes
  interrupted=yes
  [[ -z $comfyui_pid ]] || kill -TERM "$comfyui_pid" 2>/dev/null || true
  [[ -z $pause_pid ]] || kill_group "$pause_pid"
}

pause() { # SECONDS, fewer if a signal comes
  start_job sleep "$1"
  pause_pid=$job_pid
  [[ $stopping == no ]] || kill_group "$pause_pid"
  wait_for "$pause_pid" || true
  pause_pid=
}

# The worker reads the reason in the pid file, reports it to RunPod and ends. A gateway gets a signal instead.
give_up() { # REASON
  printf '%s\n' "$1" >"$COMFYUI_PID_FILE.new"
  mv -f "$COMFYUI_PID_FILE.new" "$COMFYUI_PID_FILE"
  say "$1; it is not started again." 2>&"$log_pipe"
  pause "$GIVE_UP_GRACE_S"
  [[ $stopping == yes ]] || kill -TERM "$$" # in a subshell, too, the shell that waits for the worker
  while [[ $stopping == no ]]; do pause 60; done
}

# Runs in a process of its own; SIGTERM ends both it and ComfyUI.
supervise_comfyui() {
  local backoff=1 deaths=0 started tee_pid keeper_pid
  stopping=no interrupted=no comfyui_pid='' pause_pid=''
  trap on_stop TERM
  : >"$COMFYUI_LOG_FILE" # tells start_comfyui that SIGTERM is handled from here on
  start_job keep_log_small_always
  keeper_pid=$job_pid
  exec {log_pipe}> >(exec tee -a "$COMFYUI_LOG_FILE")
  tee_pid=$!
  while [[ $stopping == no ]]; do
    started=$SECONDS
    run_comfyui
    [[ $stopping == no ]] || break
    ((SECONDS - started < STABLE_S)) || backoff=1 deaths=0
    deaths=$((deaths + 1))
    if ((deaths >= max_deaths)); then
      give_up "ComfyUI died $deaths times in a row"
      break
    fi
    say "ComfyUI ended with exit code $comfyui_status and is started again in $backoff s." 2>&"$log_pipe"
    pause "$backoff"
    backoff=$((backoff * 2 < MAX_BACKOFF_S ? backoff * 2 : MAX_BACKOFF_S))
    keep_log_small
  done
  end_job "$keeper_pid"
  exec {log_pipe}>&-
  wait "$tee_pid" || true # until the last lines of ComfyUI are written
}

start_comfyui() {
  start_job supervise_comfyui
  supervisor_pid=$job_pid
  until [[ -e $COMFYUI_LOG_FILE ]]; do sleep 0.01; done
}

kill_comfyui_after_grace() {
  sleep "$STOP_GRACE_S"
  [[ -e $COMFYUI_PID_FILE && $(<"$COMFYUI_PID_FILE") =~ ^[0-9]+$ ]] || return 0
  say "ComfyUI did not end within $STOP_GRACE_S s and is killed."
  kill_group "$(<"$COMFYUI_PID_FILE")"
}

stop_comfyui() {
  [[ -n $supervisor_pid ]] || return 0
  kill -TERM "$supervisor_pid" 2>/dev/null || true
  start_job kill_comfyui_after_grace
  wait_for "$supervisor_pid" || true
  end_job "$job_pid"
  supervisor_pid=
}

# --- the worker -----------------------------------------------------------------------------------------------

on_signal() { # SIGNAL
  stop_signal=$1
  interrupted=yes
  [[ -z $worker_pid ]] || kill -s "$1" "$worker_pid" 2>/dev/null || true
}

become_worker() { # ARGUMENT…
  cd -- "$here" # where the worker reads test_input.json
  exec "${worker_command[@]}" "$@" </dev/null
}

run_worker() { # ARGUMENT…
  [[ -z $stop_signal ]] || return $((128 + $(kill -l "$stop_signal")))
  start_job become_worker "$@"
  wait_for_program "$job_pid"
  worker_pid=$job_pid
  [[ -z $stop_signal ]] || on_signal "$stop_signal" # it came while the worker was started
  wait_for "$worker_pid"
}

clean_up() {
  trap - EXIT
  [[ -z $worker_pid ]] || kill_group "$worker_pid" # processes that the worker left behind
  stop_comfyui
  [[ -z $run_dir ]] || rm -rf -- "$run_dir"
}

prepare_comfyui() {
  [[ -z ${COMFYUI_URL:-} ]] ||
    say "COMFYUI_URL=$COMFYUI_URL is not used, because ComfyUI is started here; with COMFYUI_DIR=none it is."
  run_dir=$(mktemp -d "${TMPDIR:-/tmp}/comfy-worker.XXXXXX")
  comfyui_base=
  if [[ $comfyui == emulator ]]; then
    build_emulator_command
  else
    is_true "${COMFY_CPU:-false}" || check_gpu
    is_true "${COMFY_CPU:-false}" || [[ -z ${GPU_LOCK_DIR:-} ]] || take_gpu
    build_comfyui_command
  fi
  [[ -z $comfyui_base ]] || export COMFYUI_BASE_DIRECTORY=${COMFYUI_BASE_DIRECTORY:-$comfyui_base}
  export COMFYUI_URL="http://127.0.0.1:$comfyui_port"
  export COMFYUI_PID_FILE=$run_dir/comfyui.pid COMFYUI_LOG_FILE=$run_dir/comfyui.log
}

main() {
  local status=0
  stop_signal='' worker_pid='' supervisor_pid='' run_dir='' interrupted=no
  check_bash
  read_env_file
  read_log_level
  read_worker_settings
  read_max_deaths
  choose_comfyui
  trap clean_up EXIT
  trap 'on_signal TERM' TERM
  trap 'on_signal INT' INT
  if [[ $comfyui != elsewhere ]]; then
    prepare_comfyui
    start_comfyui
  fi
  run_worker "$@" || status=$?
  if [[ $status == 0 && $comfyui != elsewhere && -e $COMFYUI_PID_FILE && ! $(<"$COMFYUI_PID_FILE") =~ ^[0-9]+$ ]]; then
    status=$EXIT_COMFYUI # the worker ended in good order, but because start.sh gave up on ComfyUI
  fi
  clean_up
  exit "$status"
}

main "$@"
