#!/usr/bin/env bash
# Runs the tests however they may be started; the figures and the result of each run come last.
#   tests/conditions.sh            the whole suite twice under all conditions at once, the second time with the load
#   tests/conditions.sh short      a few files once, under all conditions but the load (a minute; part of CI)
# The conditions: random order, SIGINT ignored, nohup, setsid, no terminal, a path with spaces, another time zone and
# locale, umask 077, a shell that exports COLUMNS and FORCE_COLOR, and two busy loops per core. Each run works on a
# clone of the last commit and uses this checkout's environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$PWD/.venv/bin/python
scratch=$(mktemp -d)
clone="$scratch/a path with spaces/checkout"
burners=()
results=()
# shellcheck disable=SC2329 # by the trap
cleanup() {
  if [ ${#burners[@]} -gt 0 ]; then kill "${burners[@]}" 2>/dev/null; fi
  rm -rf "$scratch"
  if [ ${#results[@]} -gt 0 ]; then printf '\n%-12s %8s  %s\n' condition seconds result; printf '%s\n' "${results[@]}"; fi
}
trap cleanup EXIT
git clone --quiet . "$clone"

marks='not slow and not gpu and not image and not lab'
short=(tests/test_config.py tests/test_bucket.py tests/test_environment.py tests/test_ledger.py tests/test_journal.py
       tests/test_launch_container.py tests/test_launch_down.py tests/test_costs_forms.py tests/test_prep.py
       tests/test_plan_command.py)
failed=0

run() { # NAME COMMAND-PREFIX ...
  local name=$1 began=$SECONDS seed=$RANDOM outcome=ok
  shift
  printf '\n== %s: seed %d, load %s\n' "$name" "$seed" "$(cut -d' ' -f1-3 /proc/loadavg)"
  # pytest-randomly is off by default: the order of the files is that of their names.
  if ! (cd "$clone" && "$@" "$python" -m pytest -o addopts="--strict-markers -q" -p randomly -p no:cacheprovider -n 3 --dist=loadfile \
        --randomly-seed="$seed" -m "$marks" "${files[@]}" </dev/null); then
    outcome=FAILED failed=1
  fi
  results+=("$(printf '%-12s %8d  %s (seed %d)' "$name" $((SECONDS - began)) "$outcome" "$seed")")
}

# All conditions at once: a test that fails under one of them also fails here. A shell starts what is in its background
# with SIGINT ignored.
umask 077
odd=(bash -c 'trap "" INT; exec setsid --wait nohup "$@"' bash env TZ=Asia/Kathmandu LANG=C LC_ALL=C
     COLUMNS=40 LINES=10 FORCE_COLOR=1)

if [ "${1:-}" = short ]; then
  files=("${short[@]}")
  run short "${odd[@]}"
  exit $failed
fi

files=()
run idle "${odd[@]}"
for _ in $(seq $(($(nproc) * 2))); do
  (while :; do :; done) &
  burners+=($!)
done
run load "${odd[@]}"
exit $failed
