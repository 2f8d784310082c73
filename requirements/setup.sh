#!/usr/bin/env bash
# Fills a virtual environment with one hash-pinned set. A second call installs nothing, an interrupted one is repaired.
#   requirements/setup.sh SET VENV [torch|cuda]     SET: dev, demo, docs, coverage or launch; torch: its CPU build too, cuda: for GPUs
# PYTHON names the interpreter. A uv on PATH is used; without one, a pinned uv goes into the environment. Mirrors and
# folders of wheels come from uv's own variables, else from pip's settings.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSIONS="3.11 3.12 3.13 3.14"
MIN_UV="0.7" # --torch-backend
set_name=$1 venv=$2 with_torch=${3:-}
python=${PYTHON:-python3}
requirements=requirements/$set_name.txt
log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Run a command whose output matters only if it fails; then say what to do in one sentence.
attempt() { # WHAT COMMAND ...
  local what=$1
  shift
  if "$@" >"$log" 2>&1; then return; fi
  tail -n 15 "$log" >&2
  if grep -qiE 'no space left|os error 28|disk quota' "$log"; then
    fail "could not $what: the disk is full; free some GB where $venv and uv's cache are (uv cache clean), then run the same command again"
  elif grep -qiE 'hash mismatch|do not match the hash|THESE PACKAGES DO NOT MATCH' "$log"; then
    fail "could not $what: a file differs from its pinned hash; a mirror may serve another build (lines above)"
  elif grep -qiE 'dns|resolve|connect|timed? ?out|network|ssl|certificate|proxy' "$log"; then
    fail "could not $what: the package index does not answer (lines above); check the network, or name a mirror in UV_DEFAULT_INDEX, then run the same command again"
  fi
  fail "could not $what (lines above); then run the same command again"
}

# CUDA's wheels need a driver of the series that launch/node/container.sh names, and a GPU of Turing or newer.
check_driver() {
  local needed driver old how
  needed=$(sed -n 's/^CUDA_DRIVER=//p' launch/node/container.sh)
  how="install NVIDIA's driver R$needed or newer (Ubuntu: sudo apt install nvidia-driver-$needed; WSL2: in Windows), start"
  how+=" the computer again, then run the same command again; without a GPU: make setup"
  [ "$(uname -s)" = Linux ] || fail "GPU=1 needs Linux, which WSL2 is; this is $(uname -s): run make setup, for the CPU"
  nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader >"$log" 2>&1 ||
    fail "no NVIDIA GPU answers (nvidia-smi: $(head -n 1 "$log")); $how"
  driver=$(head -n 1 "$log" | cut -d, -f1)
  [ "${driver%%.*}" -ge "$needed" ] 2>/dev/null ||
    fail "the driver is '$driver', and CUDA 13.0, with which torch is built, needs R$needed; $how"
  old=$(awk -F', ' '$2 + 0 < 7.5 { print $3 " (" $2 ")" }' "$log" | sort -u | paste -sd ';')
  [ -z "$old" ] || fail "CUDA 13.0 serves GPUs of compute capability 7.5 (Turing) and newer; this computer has $old"
}
if [ "$with_torch" = cuda ]; then check_driver; fi

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
  fail "PYTHON is $python, which does not run; install Python ${VERSIONS// /, } or set PYTHON=/path/to/python3"
case " $VERSIONS " in
  *" $version "*) ;;
  *) fail "Python ${VERSIONS// /, } is supported, $python is $version; set PYTHON=/path/to/python3.12" ;;
esac

# An environment whose Python does not run, or is another version, is made anew. Anything else is not ours to remove.
if [ -e "$venv" ]; then
  [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
    fail "$venv is there but is not a virtual environment; move it away, or set VENV"
  if [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" != "$version" ]; then
    echo "$venv has no working Python $version: made anew"
    rm -rf "$venv"
  fi
fi

has_uv() { # a uv that is new enough
  local found
  found=$("$1" --version 2>/dev/null | cut -d' ' -f2) && [ -n "$found" ] &&
    [ "$(printf '%s\n' "$MIN_UV" "$found" | sort -V | head -n 1)" = "$MIN_UV" ]
}
if has_uv uv; then
  uv=uv
  [ -e "$venv/bin/python" ] || attempt "create $venv" uv venv --quiet --python "$python" "$venv"
else
  uv=$venv/bin/uv
  [ -x "$venv/bin/pip" ] || attempt "create $venv (on Debian and Ubuntu: apt install python3-venv)" "$python" -m venv "$venv"
  has_uv "$uv" || attempt "install uv" \
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/uv.txt
fi

# uv does not read pip's settings, where a company's mirror or a folder of wheels may be named.
setting() { "$python" -m pip config get "global.$1" 2>/dev/null || echo; }
find_links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(setting find-links)}}
index=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-${PIP_INDEX_URL:-$(setting index-url)}}}
[ -z "$index" ] || export UV_DEFAULT_INDEX=$index
install=("$uv" pip install --python "$venv/bin/python" --no-deps)

attempt "install $requirements into $venv" "${install[@]}" --require-hashes -r "$requirements"

if [ "$with_torch" = cuda ]; then
  attempt "install torch with CUDA into $venv" "${install[@]}" --require-hashes -r requirements/train-cuda.txt
  "$venv/bin/python" -c 'import torch; torch.zeros(1, device="cuda")' >"$log" 2>&1 ||
    fail "torch finds no GPU ($(tail -n 1 "$log")); nvidia-smi must list one, and CUDA_VISIBLE_DEVICES must not hide it"
elif [ -n "$with_torch" ]; then
  torch=$(cat requirements/torch.constraint)
  wheels=("${install[@]}" --no-index)
  for place in $find_links; do wheels+=(--find-links "$place"); done
  backend=()
  if [ "$(uname -s)" = Linux ]; then backend=(--torch-backend=cpu); fi # elsewhere the only build is for the CPU
  hashed=(--require-hashes -r requirements/torch-cpu.txt)
  # A folder of wheels may hold the CPU build; PyTorch's own index does.
  if [ -z "$find_links" ] || ! "${wheels[@]}" "${hashed[@]}" >"$log" 2>&1; then
    attempt "install the CPU build of $torch into $venv" "${install[@]}" "${backend[@]}" "${hashed[@]}"
  fi
  if ! "$uv" pip show --python "$venv/bin/python" torch >/dev/null 2>&1; then
    echo "no hash of torch's CPU build is known for Python $version on $(uname -sm): installing it without one"
    attempt "install the CPU build of $torch into $venv" "${install[@]}" "${backend[@]}" "$torch"
  fi
fi
