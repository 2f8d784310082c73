#!/usr/bin/env bash
# Makes the image on a rented node, and runs one command in its container, which ends with the job.
#   launch/node/container.sh image TARGET              pull $IMAGE, or build TARGET (prep, train) of the Dockerfile
#   launch/node/container.sh build TARGET              build TARGET
#   launch/node/container.sh push TARGET               test it, push it to $IMAGE, join it with the other platform's
#   launch/node/container.sh run TARGET COMMAND ...    exits with the command's code
# The tasks in sky/ call this script. It passes SkyPilot's variables, envs and secrets to the container by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

NAME=pretrain-launcher
# End of the last job on this machine. An earlier time belongs to that job.
ENDED=$HOME/.pretrain-launcher-ended
# Grace period for saving, within the two minutes between AWS's notice and the end of a spot machine.
STOP_SECONDS=100
# torch's CUDA 13.0 needs driver R580, or NVIDIA's compatibility package on an older one. That package supports
# data-centre GPUs from R535 on (NVIDIA's "CUDA Compatibility", table of forward compatibility, 2026-09).
CUDA_DRIVER=580
COMPAT_DRIVER=535
COMPAT=/usr/local/cuda-13.0/compat
# The code of core/exit_codes.py. After this many minutes since its submission a managed job takes no other machine.
BAD_NODE=35
# A wait without a limit would keep a paid machine up.
NVIDIA_SMI_SECONDS=60
ASK_SECONDS=120      # a question to the docker engine
PULL_SECONDS=1800
BUILD_SECONDS=5400
TEST_SECONDS=600     # a self-test of an image
INSTALL_SECONDS=900
TRY_MACHINES_MINUTES=15
# Of launch/node/switch.py, which ends a machine without signs of life.
SWITCH_FOLDER=/var/lib/pretrain-launcher

say() { printf '%s %s\n' "$(date -u +%T)" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# GPUS: driver and name of each GPU that answers. DRIVER: that driver. OLD_DRIVER: the same, if CUDA needs the
# compatibility package with it. Ignores the exit code: 14 is a warning, 15 means that one GPU is lost.
GPUS='' DRIVER='' OLD_DRIVER=''
find_gpus() {
  GPUS=$(ask_gpus | grep -E '^[0-9.]+, ') || GPUS=''
  DRIVER=${GPUS%%,*}
  OLD_DRIVER=''
  if [ -n "$DRIVER" ] && [ "${DRIVER%%.*}" -lt $CUDA_DRIVER ]; then OLD_DRIVER=$DRIVER; fi
}

# Prints what nvidia-smi says within a minute. It is not waited for longer: a process that waits inside of a driver
# does not end even by SIGKILL, and `timeout` would wait with it.
ask_gpus() {
  local answer pid
  answer=$(mktemp)
  nvidia-smi --query-gpu=driver_version,name --format=csv,noheader >"$answer" 2>/dev/null </dev/null &
  pid=$!
  for ((tenths = 0; tenths < NVIDIA_SMI_SECONDS * 10; tenths++)); do
    kill -0 $pid 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL $pid 2>/dev/null && say "nvidia-smi did not answer within $NVIDIA_SMI_SECONDS s"
  cat "$answer"
  rm -f "$answer"
}

# Refuses a host whose driver cannot run the image, before the image costs minutes. If no GPU answers, the preflight
# decides.
check_driver() {
  local unsupported
  [ "${DEVICE:-}" = cuda ] || return 0
  find_gpus
  if [ -z "$DRIVER" ]; then
    [ "${SKYPILOT_SETUP_NUM_GPUS_PER_NODE:-0}" = 0 ] || say "nvidia-smi shows no GPU"
    return 0
  fi
  say "driver $DRIVER, $(cut -d' ' -f2- <<<"$GPUS" | uniq -c | xargs)"
  [ -n "$OLD_DRIVER" ] || return 0
  unsupported=$(grep -m1 -oE '[^,]*(GeForce|RTX|Quadro|TITAN).*' <<<"$GPUS") || unsupported=''
  if [ "${DRIVER%%.*}" -lt $COMPAT_DRIVER ]; then
    refuse "its driver $DRIVER is older than R$COMPAT_DRIVER, the oldest that NVIDIA's compatibility package for CUDA" \
      "13.0 supports; take a machine with R$CUDA_DRIVER or newer, from another cloud or with another machine image"
  elif [ -n "$unsupported" ]; then
    refuse "its driver $DRIVER is older than CUDA 13.0 needs (R$CUDA_DRIVER), and NVIDIA's compatibility package does" \
      "not support its$unsupported; take a machine with R$CUDA_DRIVER or newer, or with data-centre GPUs (A10, A100, ...)"
  elif [ -z "${IMAGE:-}" ] && [ "${CUDA_COMPAT:-}" = no ]; then
    refuse_without_compat "CUDA_COMPAT=no leaves that out of the image"
  fi
  say "it is older than CUDA 13.0 needs (R$CUDA_DRIVER): the image's compatibility package provides libcuda"
}

refuse() { # REASON ...: exit, because this machine cannot run the image and another one may
  local last=$((${SUBMITTED_AT:-0} + TRY_MACHINES_MINUTES * 60))
  # On this code SkyPilot would restart a managed job without end.
  if [ -n "${SKYPILOT_MANAGED_JOB_ID:-}" ] && [ "$(date +%s)" -gt $last ]; then
    fail "this node is refused, and the job ends," \
      "because it takes other machines only for $TRY_MACHINES_MINUTES minutes: $*"
  fi
  printf 'error: this node is refused: %s\n' "$*" >&2
  exit $BAD_NODE
}

refuse_without_compat() { # CAUSE
  refuse "its driver $DRIVER is older than CUDA 13.0 needs (R$CUDA_DRIVER) without NVIDIA's compatibility package, and" \
    "$1; take a machine with R$CUDA_DRIVER or newer, or an image that holds the package"
}

holds_compat() { # TARGET
  within $TEST_SECONDS run --rm --network none "$NAME:$1" test -e "$COMPAT/libcuda.so.1"
}

# Starts the switch of a machine that SkyPilot rented, unless the first boot has, and gives signs of life as long as this
# shell runs, or until live_no_more. The signs stop with this shell even if it is killed.
PULSE=
live() {
  [ -n "${SKYPILOT_CLUSTER_INFO:-}" ] || return 0
  sudo -n timeout -k 5 60 python3 launch/node/switch.py --ours ${SWITCH_MINUTES:+"$SWITCH_MINUTES"} \
    </dev/null >/dev/null 2>&1 || say "launch/node/switch.py did not start: nothing ends this machine if its jobs hang"
  if [ -d "$SWITCH_FOLDER" ] && [ "${SKYPILOT_NUM_NODES:-1}" != 1 ]; then
    head -n 1 <<<"${SKYPILOT_NODE_IPS:-}" >"$SWITCH_FOLDER/head"
  fi
  while kill -0 $$; do
    touch -c "$SWITCH_FOLDER/alive"
    sleep 10
  done </dev/null >/dev/null 2>&1 &
  PULSE=$!
}
live_no_more() { [ -z "$PULSE" ] || kill "$PULSE" 2>/dev/null || true; }

# Records for the cap, on the first of the nodes, that this machine is paid for, until a program of ours records it.
# Two machines may start in the same second, with the same ids of processes.
ATTEMPT=$(date -u +%Y%m%dT%H%M%SZ)-setup-$(od -An -N4 -tx4 /dev/urandom | tr -d ' ')
arrive() { # begin, or end: the set-up has failed
  [ -n "${SKYPILOT_CLUSTER_INFO:-}" ] && [ -n "${BUCKET:-}" ] && [ "${SKYPILOT_SETUP_NODE_RANK:-0}" = 0 ] || return 0
  [ -n "${USD_PER_HOUR:-}${USD_PER_HOUR_AT_MOST:-}" ] || return 0
  SEGMENT_STARTED_AT=$(started_at) timeout -k 5 90 python3 -m launch.node.arrival "$1" "$ATTEMPT" || true
}
set_up_ended() { # EXIT_CODE
  [ "$1" = 0 ] || arrive end
  exit "$1"
}

SUDO=()
find_docker() {
  if ! command -v docker >/dev/null; then
    say "installing docker"
    sudo timeout -k 10 $INSTALL_SECONDS apt-get update -qq
    sudo timeout -k 10 $INSTALL_SECONDS apt-get install -y -qq docker.io >/dev/null
  fi
  timeout -k 10 $ASK_SECONDS docker info >/dev/null 2>&1 && return
  # Lambda's user is not in the group docker. -E keeps the variables, which the container gets by name.
  SUDO=(sudo -E)
  within $ASK_SECONDS info >/dev/null || fail "the docker engine of $(hostname) does not answer; see the lines above"
}

within() { # SECONDS ARGUMENTS ...: docker with these arguments, killed after that time
  local seconds=$1 code=0
  shift
  "${SUDO[@]}" timeout -k 10 "$seconds" docker "$@" || code=$?
  [ $code != 124 ] || say "docker $1 did not end within $seconds s"
  return $code
}

# The URL that BUCKET and RUN (or DATA) name, by the function that the programs on the user's computer use.
bucket_url() { # RUN or DATA
  python3 -m launch.node.place "$1"
}

machine_arch() { case $(uname -m) in x86_64) echo amd64 ;; aarch64) echo arm64 ;; *) uname -m ;; esac; }

image() { # TARGET
  local target=$1 arch
  if [ -z "${IMAGE:-}" ]; then
    build "$target"
    return
  fi
  say "pulling $IMAGE-$target"
  within $PULL_SECONDS pull --quiet "$IMAGE-$target"
  arch=$(within $ASK_SECONDS image inspect -f '{{.Architecture}}' "$IMAGE-$target")
  [ "$arch" = "$(machine_arch)" ] || fail "image $IMAGE-$target is for $arch, this machine is $(machine_arch);" \
    "publish it for both (make image), or leave IMAGE empty to build it here"
  within $ASK_SECONDS tag "$IMAGE-$target" "$NAME:$target"
  if [ "$target" = train ] && [ -n "$OLD_DRIVER" ] && ! holds_compat "$target"; then
    refuse_without_compat "$IMAGE-$target does not hold it"
  fi
}

build() { # TARGET
  local target=$1 compat=${CUDA_COMPAT:-}
  # An image for this host alone: a new driver needs no package from NVIDIA's repository.
  if [ -n "$DRIVER" ] && [ -z "$OLD_DRIVER" ]; then compat=${compat:-no}; fi
  say "building the image $target here"
  # The inline cache lets a later build reuse the layers of a pushed image (IMAGE_CACHE). An attestation would make each
  # platform's image an index, which cannot be joined with another.
  export DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1
  within $BUILD_SECONDS build --target "$target" --tag "$NAME:$target" \
    --build-arg "TORCH=${DEVICE:-cuda}" ${compat:+--build-arg "CUDA_COMPAT=$compat"} \
    --build-arg "GIT_REVISION=${GIT_REVISION:-}" --build-arg BUILDKIT_INLINE_CACHE=1 \
    ${IMAGE_CACHE:+--cache-from "$IMAGE_CACHE-$target"} .
  say "image $target: $(within $ASK_SECONDS image inspect -f '{{.Size}} bytes, {{.Architecture}}' "$NAME:$target")"
}

push() { # TARGET
  local target=$1 one other
  within $TEST_SECONDS run --rm "$NAME:$target"
  if [ -z "${REGISTRY_USER:-}" ]; then
    say "REGISTRY_USER is empty: built, not pushed"
    return
  fi
  [ -n "${REGISTRY_PASSWORD:-}" ] || fail "REGISTRY_PASSWORD is empty; give it as a secret"
  within $ASK_SECONDS login --username "$REGISTRY_USER" --password-stdin "${IMAGE%%/*}" <<<"$REGISTRY_PASSWORD"
  one=$IMAGE-$target-$(machine_arch)
  within $ASK_SECONDS tag "$NAME:$target" "$one"
  within $BUILD_SECONDS push --quiet "$one"
  case $(machine_arch) in amd64) other=$IMAGE-$target-arm64 ;; *) other=$IMAGE-$target-amd64 ;; esac
  if ! within $PULL_SECONDS manifest inspect "$other" >/dev/null 2>&1; then
    say "$other is not there yet: its build joins them"
    return
  fi
  within $PULL_SECONDS manifest create --amend "$IMAGE-$target" "$one" "$other"
  within $PULL_SECONDS manifest push --purge "$IMAGE-$target"
}

remove_containers() { # of the job before: one that outlived its docker client holds the GPUs and the name
  local name
  for name in "$NAME" "$NAME-alive"; do
    if within $ASK_SECONDS container inspect "$name" >/dev/null 2>&1; then within $ASK_SECONDS rm -f "$name" >/dev/null; fi
  done
}

stop_container() {
  # `sky cancel` kills the client with a broken pipe before it can pass SIGTERM on to the container.
  if within $ASK_SECONDS container inspect "$NAME" >/dev/null 2>&1; then
    within $((STOP_SECONDS + 30)) stop -t $STOP_SECONDS "$NAME" >/dev/null
  fi
  date +%s >"$ENDED"
}

# Unix time at which this job's paid time began: the boot, or the end of the job before it.
started_at() {
  local boot ended=0
  boot=$(($(date +%s) - $(ps -o etimes= -p 1)))
  [ ! -s "$ENDED" ] || ended=$(cat "$ENDED")
  echo $((ended > boot ? ended : boot))
}

# Starts a small container that records, until the machine ends, that it is up: launch/node/alive.py.
ALIVE=()
record_life() {
  [ -n "${SKYPILOT_CLUSTER_INFO:-}" ] && [ ${#ALIVE[@]} -gt 0 ] || return 0
  within 20 run --detach --rm --init --no-healthcheck --name "$NAME-alive" --network host --memory 1g --cpu-shares 64 "${ALIVE[@]}" \
    python -m launch.node.alive >/dev/null 2>&1 || say "the time until this machine ends is not recorded"
}

run() { # TARGET COMMAND ...
  local target=$1 name device options=()
  shift
  remove_containers
  SEGMENT_STARTED_AT=$(started_at)
  # The container cannot read the kernel log. Its XID lines name GPU faults.
  NODE_XIDS=$(sudo -n timeout -k 5 20 dmesg 2>/dev/null | grep -o 'NVRM: Xid.*' | tail -n 20) || NODE_XIDS=
  RUN_URL=$(bucket_url RUN)
  DATA_URL=$(bucket_url DATA)
  # The registry's digest of a pulled image, the id of an image that was built here.
  IMAGE_DIGEST=$(within $ASK_SECONDS image inspect --format \
    '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$NAME:$target")
  export SEGMENT_STARTED_AT NODE_XIDS RUN_URL DATA_URL IMAGE_DIGEST
  for name in $(compgen -e); do
    case $name in
      # Programs do not get the login by which SkyPilot rents: the bucket has separate keys.
      AWS_ACCESS_KEY_ID | AWS_SECRET_ACCESS_KEY | AWS_SESSION_TOKEN | AWS_PROFILE) ;;
      SKYPILOT_* | BUCKET_* | AWS_* | AZURE_* | NCCL_* | DEVICE | MAX_USD | MAX_HOURS | MAX_RESTART_USD | USD_PER_HOUR | PRICE_SOURCE | \
        CONTROLLER_USD_PER_HOUR | SUBMITTED_AT | \
        CLOUD | REGION | ZONE | INSTANCE_TYPE | USE_SPOT | RUN_URL | DATA_URL | SOURCE_URL | VOCAB_URL | RUN_TAGS | \
        OPENAI_API_KEY | OPENAI_BASE_URL | SERVE_API_KEY | WANDB_PROJECT | WANDB_API_KEY | MLFLOW_TRACKING_URI | MLFLOW_EXPERIMENT_NAME | \
        RANKS_PER_NODE | HANG_MINUTES | HF_TOKEN | SEGMENT_STARTED_AT | NODE_XIDS | IMAGE_DIGEST)
        # Libraries read an empty AWS_ENDPOINT_URL or AWS_ACCESS_KEY_ID as a value.
        [ -z "${!name}" ] || options+=(-e "$name") ;;
    esac
  done
  ALIVE=("${options[@]}" "$NAME:$target")
  find_gpus
  if [ -n "$GPUS" ]; then options+=(--gpus all); fi
  # NVIDIA's container toolkit does this from 1.17.5 on, unless it is switched off. With a new driver the package's
  # older libcuda would fail.
  if [ -n "$OLD_DRIVER" ] && [ "${DEVICE:-}" = cuda ] && holds_compat "$target"; then
    options+=(-e "LD_LIBRARY_PATH=$COMPAT")
  fi
  # The program gives the signs of life from here on: this shell would also wait for a docker engine that hangs.
  if [ -n "$PULSE" ] && [ -d "$SWITCH_FOLDER" ]; then
    options+=(-v "$SWITCH_FOLDER:$SWITCH_FOLDER" -e "ALIVE_FILE=$SWITCH_FOLDER/alive")
  fi
  live_no_more
  for device in /dev/infiniband/*; do [ ! -e "$device" ] || options+=(--device "$device"); done
  # AWS's GPU machine images hold libfabric and its NCCL plugin here; our image does not.
  for name in /opt/amazon/efa /opt/amazon/ofi-nccl; do [ ! -d "$name" ] || options+=(-v "$name:$name:ro"); done
  # Host network for rendezvous, NCCL and the metadata service; host IPC and memlock for shared memory.
  "${SUDO[@]}" docker run --rm --init --name "$NAME" --network host --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    -v "$NAME-cache:/cache" "${options[@]}" "$NAME:$target" "$@" &
  CLIENT=$!
  wait "$CLIENT"
}

# Exits with 33 after a request to stop, so that a managed job starts again; a program that gets the signal before
# Python runs exits with 143. Codes of the program win: done (0), the cap (34), a bad machine (35).
CLIENT=
leave() { # EXIT_CODE
  local code=$1 said=
  stop_container || say "the container could not be stopped; see the lines above"
  record_life
  case $code in 129 | 130 | 143) ;; *) exit "$code" ;; esac
  if [ -n "$CLIENT" ]; then
    for _ in {1..50}; do kill -0 "$CLIENT" 2>/dev/null || break; sleep 0.1; done
    # The container may have started only now.
    if kill -0 "$CLIENT" 2>/dev/null && ! stop_container; then
      say "the container could not be stopped; see the lines above"
      exit 33
    fi
    wait "$CLIENT" && said=0 || said=$?
  fi
  case $said in 0 | 34 | 35) exit "$said" ;; *) exit 33 ;; esac
}

case "${1:-} $#" in
  "image 2")
    trap 'set_up_ended $?' EXIT
    live; arrive begin; check_driver; find_docker; image "$2" ;;
  "build 2" | "push 2") live; find_docker; "$1" "$2" ;;
  "run "[3-9] | "run "[1-9][0-9]*)
    trap 'leave $?' EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    trap 'exit 129' HUP
    live; find_docker; shift; run "$@" ;;
  *) sed -n 2,7p "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
