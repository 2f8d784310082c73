#!/usr/bin/env bash
# On a rented node, outside the container: make the image, and run one command in it that ends when the job ends.
#   launch/node/container.sh image TARGET              pull $IMAGE, or build TARGET (prep, train) of the Dockerfile here
#   launch/node/container.sh build TARGET              build it in any case
#   launch/node/container.sh push TARGET               try it, push it to $IMAGE, join it with that of the other platform
#   launch/node/container.sh run TARGET COMMAND ...    exits with the command's code
# Called by the tasks in sky/. SkyPilot's variables, the tasks' envs and their secrets reach the container by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

NAME=pretrain-launcher
# What was paid for before this time belongs to an earlier job on this machine.
ENDED=$HOME/.pretrain-launcher-ended
# Time to save, within the two minutes that AWS gives before it takes a spot machine.
STOP_SECONDS=100
# torch's CUDA 13.0 came with driver R580. On an older one it needs NVIDIA's compatibility package, which supports
# data-centre GPUs, from R535 on (NVIDIA's "CUDA Compatibility", table of forward compatibility, 2026-09).
CUDA_DRIVER=580
COMPAT_DRIVER=535
COMPAT=/usr/local/cuda-13.0/compat
# As in core/console.py: a managed job takes another machine, so long after it was submitted; then it ends.
BAD_NODE=35
TRY_MACHINES_MINUTES=15

say() { printf '%s %s\n' "$(date -u +%T)" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# GPUS: driver and name of each GPU of this host that answers. DRIVER: that driver. OLD_DRIVER: the same, if CUDA needs
# the compatibility package with it. The exit code does not count: 14 is a warning, 15 means that one GPU is lost.
GPUS='' DRIVER='' OLD_DRIVER=''
find_gpus() {
  GPUS=$(
    set +o pipefail
    timeout -k 5 60 nvidia-smi --query-gpu=driver_version,name --format=csv,noheader 2>/dev/null | grep -E '^[0-9.]+, '
  ) || GPUS=''
  DRIVER=${GPUS%%,*}
  OLD_DRIVER=''
  if [ -n "$DRIVER" ] && [ "${DRIVER%%.*}" -lt $CUDA_DRIVER ]; then OLD_DRIVER=$DRIVER; fi
}

# Before minutes are paid for an image: can this host's driver run it? Where nothing answers, the preflight decides.
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
  say "it is older than CUDA 13.0 needs (R$CUDA_DRIVER): the image's compatibility package stands in"
}

refuse() { # REASON ...: this machine cannot run the image, another one may
  local last=$((${SUBMITTED_AT:-0} + TRY_MACHINES_MINUTES * 60))
  # SkyPilot would restart a managed job on this code for ever.
  if [ -n "${SKYPILOT_MANAGED_JOB_ID:-}" ] && [ "$(date +%s)" -gt $last ]; then
    fail "this node is refused, and the job ends, since it takes others only $TRY_MACHINES_MINUTES minutes long: $*"
  fi
  printf 'error: this node is refused: %s\n' "$*" >&2
  exit $BAD_NODE
}

refuse_without_compat() { # CAUSE
  refuse "its driver $DRIVER is older than CUDA 13.0 needs (R$CUDA_DRIVER) without NVIDIA's compatibility package, and" \
    "$1; take a machine with R$CUDA_DRIVER or newer, or an image that holds the package"
}

holds_compat() { # TARGET
  "${DOCKER[@]}" run --rm --network none "$NAME:$1" test -e "$COMPAT/libcuda.so.1"
}

DOCKER=(docker)
find_docker() {
  command -v docker >/dev/null || { say "installing docker"; sudo apt-get update -qq; sudo apt-get install -y -qq docker.io >/dev/null; }
  docker info >/dev/null 2>&1 && return
  # Lambda's user is not in the group docker. -E: variables go to the container by name.
  DOCKER=(sudo -E docker)
  "${DOCKER[@]}" info >/dev/null || fail "the docker engine of $(hostname) does not answer; see the lines above"
}

# The URL that BUCKET and RUN (or DATA) name, worked out where the programs on the user's computer do it, too.
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
  "${DOCKER[@]}" pull --quiet "$IMAGE-$target"
  arch=$("${DOCKER[@]}" image inspect -f '{{.Architecture}}' "$IMAGE-$target")
  [ "$arch" = "$(machine_arch)" ] || fail "image $IMAGE-$target is for $arch, this machine is $(machine_arch);" \
    "publish it for both (make image), or leave IMAGE empty to build it here"
  "${DOCKER[@]}" tag "$IMAGE-$target" "$NAME:$target"
  if [ "$target" = train ] && [ -n "$OLD_DRIVER" ] && ! holds_compat "$target"; then
    refuse_without_compat "$IMAGE-$target does not hold it"
  fi
}

build() { # TARGET
  local target=$1 compat=${CUDA_COMPAT:-}
  # Built here, for here: a driver that is new enough needs nothing from NVIDIA's repository.
  if [ -n "$DRIVER" ] && [ -z "$OLD_DRIVER" ]; then compat=${compat:-no}; fi
  say "building the image $target here"
  # With its cache inside, a pushed image also shortens the next build (IMAGE_CACHE).
  # An attestation would make each platform's image an index, which cannot be joined with another.
  DOCKER_BUILDKIT=1 BUILDX_NO_DEFAULT_ATTESTATIONS=1 "${DOCKER[@]}" build --target "$target" --tag "$NAME:$target" \
    --build-arg "TORCH=${DEVICE:-cuda}" ${compat:+--build-arg "CUDA_COMPAT=$compat"} \
    --build-arg "GIT_REVISION=${GIT_REVISION:-}" --build-arg BUILDKIT_INLINE_CACHE=1 \
    ${IMAGE_CACHE:+--cache-from "$IMAGE_CACHE-$target"} .
  say "image $target: $("${DOCKER[@]}" image inspect -f '{{.Size}} bytes, {{.Architecture}}' "$NAME:$target")"
}

push() { # TARGET
  local target=$1 one other
  "${DOCKER[@]}" run --rm "$NAME:$target"
  if [ -z "${REGISTRY_USER:-}" ]; then
    say "REGISTRY_USER is empty: built, not pushed"
    return
  fi
  [ -n "${REGISTRY_PASSWORD:-}" ] || fail "REGISTRY_PASSWORD is empty; give it as a secret"
  "${DOCKER[@]}" login --username "$REGISTRY_USER" --password-stdin "${IMAGE%%/*}" <<<"$REGISTRY_PASSWORD"
  one=$IMAGE-$target-$(machine_arch)
  "${DOCKER[@]}" tag "$NAME:$target" "$one"
  "${DOCKER[@]}" push --quiet "$one"
  case $(machine_arch) in amd64) other=$IMAGE-$target-arm64 ;; *) other=$IMAGE-$target-amd64 ;; esac
  if ! "${DOCKER[@]}" manifest inspect "$other" >/dev/null 2>&1; then
    say "$other is not there yet: whoever builds it joins them"
    return
  fi
  "${DOCKER[@]}" manifest create --amend "$IMAGE-$target" "$one" "$other"
  "${DOCKER[@]}" manifest push --purge "$IMAGE-$target"
}

remove_container() { # what a killed docker client left behind still holds the GPUs and the name
  if "${DOCKER[@]}" container inspect "$NAME" >/dev/null 2>&1; then "${DOCKER[@]}" rm -f "$NAME" >/dev/null; fi
}

stop_container() {
  # `sky cancel` ends the client, not the container: it dies of a broken pipe before it could pass SIGTERM on.
  if "${DOCKER[@]}" container inspect "$NAME" >/dev/null 2>&1; then
    "${DOCKER[@]}" stop -t $STOP_SECONDS "$NAME" >/dev/null
  fi
  date +%s >"$ENDED"
}

# When the time that this job is accountable for began: the boot, or the end of the job before it.
started_at() {
  local boot ended=0
  boot=$(($(date +%s) - $(ps -o etimes= -p 1)))
  [ ! -s "$ENDED" ] || ended=$(cat "$ENDED")
  echo $((ended > boot ? ended : boot))
}

run() { # TARGET COMMAND ...
  local target=$1 name device options=()
  shift
  remove_container
  SEGMENT_STARTED_AT=$(started_at)
  # The kernel log is not readable in the container; XID lines name GPU faults.
  NODE_XIDS=$(sudo -n dmesg 2>/dev/null | grep -o 'NVRM: Xid.*' | tail -n 20) || NODE_XIDS=
  RUN_URL=${RUN_URL:-$(bucket_url RUN)}
  DATA_URL=${DATA_URL:-$(bucket_url DATA)}
  # A pulled image is named by its registry's digest, one that was built here by its own id.
  IMAGE_DIGEST=$("${DOCKER[@]}" image inspect --format \
    '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}}{{end}}' "$NAME:$target")
  export SEGMENT_STARTED_AT NODE_XIDS RUN_URL DATA_URL IMAGE_DIGEST
  for name in $(compgen -e); do
    case $name in
      SKYPILOT_* | BUCKET_* | AWS_* | AZURE_* | NCCL_* | DEVICE | MAX_USD | USD_PER_HOUR | PRICE_SOURCE | \
        CLOUD | REGION | ZONE | INSTANCE_TYPE | USE_SPOT | RUN_URL | DATA_URL | SOURCE_URL | VOCAB_URL | RUN_TAGS | \
        WANDB_PROJECT | WANDB_API_KEY | MLFLOW_TRACKING_URI | MLFLOW_EXPERIMENT_NAME | \
        RANKS_PER_NODE | HANG_MINUTES | HF_TOKEN | GOOGLE_APPLICATION_CREDENTIALS | SEGMENT_STARTED_AT | NODE_XIDS | IMAGE_DIGEST)
        # An empty AWS_ENDPOINT_URL or AWS_ACCESS_KEY_ID is not the same as none.
        [ -z "${!name}" ] || options+=(-e "$name") ;;
    esac
  done
  find_gpus
  if [ -n "$GPUS" ]; then options+=(--gpus all); fi
  # NVIDIA's container toolkit does this from 1.17.5 on, unless it is switched off. Never with a driver that is new
  # enough: there the older libcuda would fail.
  if [ -n "$OLD_DRIVER" ] && [ "${DEVICE:-}" = cuda ] && holds_compat "$target"; then
    options+=(-e "LD_LIBRARY_PATH=$COMPAT")
  fi
  for device in /dev/infiniband/*; do [ ! -e "$device" ] || options+=(--device "$device"); done
  # AWS's GPU images carry libfabric and its NCCL plugin here; ours does not.
  for name in /opt/amazon/efa /opt/amazon/ofi-nccl; do [ ! -d "$name" ] || options+=(-v "$name:$name:ro"); done
  # Host network: rendezvous, NCCL and the metadata service. Host IPC and memlock: NCCL and data workers share memory.
  "${DOCKER[@]}" run --rm --init --name "$NAME" --network host --ipc host --ulimit memlock=-1 --ulimit stack=67108864 \
    -v "$NAME-cache:/cache" "${options[@]}" "$NAME:$target" "$@" &
  CLIENT=$!
  wait "$CLIENT"
}

# A request to stop is no failure, whether it comes here, or to a program that Python has not begun yet (143): with 33
# a managed job starts again. Only what the program itself says counts more: done (0), the cap (34), a bad machine (35).
CLIENT=
leave() { # EXIT_CODE
  local code=$1 said=
  stop_container || say "the container could not be stopped; see the lines above"
  case $code in 129 | 130 | 143) ;; *) exit "$code" ;; esac
  if [ -n "$CLIENT" ]; then
    for _ in {1..50}; do kill -0 "$CLIENT" 2>/dev/null || break; sleep 0.1; done
    # Perhaps it has begun only now.
    if kill -0 "$CLIENT" 2>/dev/null && ! stop_container; then
      say "the container could not be stopped; see the lines above"
      exit 33
    fi
    wait "$CLIENT" && said=0 || said=$?
  fi
  case $said in 0 | 34 | 35) exit "$said" ;; *) exit 33 ;; esac
}

case "${1:-} $#" in
  "image 2") check_driver; find_docker; image "$2" ;;
  "build 2" | "push 2") find_docker; "$1" "$2" ;;
  "run "[3-9] | "run "[1-9][0-9]*)
    trap 'leave $?' EXIT
    trap 'exit 143' TERM
    trap 'exit 130' INT
    trap 'exit 129' HUP
    find_docker; shift; run "$@" ;;
  *) sed -n 2,7p "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
