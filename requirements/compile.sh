#!/usr/bin/env bash
# Refresh the hash-pinned sets from pyproject.toml. No registry address is written into them.
#   requirements/compile.sh
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade
        --constraint requirements/torch.constraint)
without_torch=(--override requirements/no-torch.override)
uv pip compile "${common[@]}" pyproject.toml --extra prep -o requirements/prep.txt
uv pip compile "${common[@]}" pyproject.toml --extra train --extra fp8 -o requirements/train-cuda.txt
# Beside the train set, whose versions it keeps.
uv pip compile "${common[@]}" "${without_torch[@]}" --constraint requirements/train-cuda.txt \
  pyproject.toml --extra track -o requirements/track.txt
uv pip compile "${common[@]}" pyproject.toml --extra launch -o requirements/launch.txt
uv pip compile "${common[@]}" "${without_torch[@]}" pyproject.toml requirements/torch-cpu.in \
  --extra prep --extra train --extra chat --extra plot --extra dev -o requirements/dev.txt
uv pip compile "${common[@]}" "${without_torch[@]}" --constraint requirements/dev.txt pyproject.toml requirements/torch-cpu.in \
  --extra demo -o requirements/demo.txt
echo zensical | uv pip compile "${common[@]}" - -o requirements/docs.txt
echo "coverage>=7.10" | uv pip compile "${common[@]}" - -o requirements/coverage.txt
echo uv | uv pip compile "${common[@]}" - -o requirements/uv.txt
# The CPU image differs from the GPU image in nothing but torch and its libraries.
uv pip compile "${common[@]}" "${without_torch[@]}" --constraint requirements/train-cuda.txt \
  pyproject.toml requirements/torch-cpu.in --extra train --extra fp8 -o requirements/train-cpu.txt
