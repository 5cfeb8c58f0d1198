#!/usr/bin/env bash
# Everything to be done on a machine with an NVIDIA GPU, in ten minutes and without a network:
#
#     tools/gpu_check.sh [FOLDER]     # default: benchmarks/results
#
# the tests of the CUDA variant, the four tools of compute-sanitizer, and the benchmarks of the shapes
# that matter, as JSON with the date, GPU, driver, torch and commit. Wants a build of the CUDA variant
# in build/ (make cuda, made anywhere) and requirements.txt in $PYTHON, or python3.
#
# A failure doesn't stop it; it ends with a list of what failed, and their number as its status.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-benchmarks/results}")
mkdir -p "$results"
python=${PYTHON:-python3}
failed=()

step() {
  local name=$1
  shift
  echo "== $name ($SECONDS s)"
  "$@" || failed+=("$name")
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step "tests" "$python" -m pytest -q -p no:cacheprovider -k "cuda and not simt" tests/test_op.py \
  tests/test_errors.py tests/test_torch.py tests/test_gemma4.py tests/test_cuda.py

# A part of the tests: every kernel, with vectors and without. The tools make them slow.
few="cuda and not simt and (every_length or no_tokens or special_values or many_token_dimensions or one_hot)"
for tool in memcheck racecheck initcheck synccheck; do
  step "compute-sanitizer $tool" timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" -m pytest -q -p no:cacheprovider -k "$few" tests/test_op.py
done

bench() {
  local name=$1
  shift
  step "$name" "$python" benchmarks/compare.py --device cuda --dtype bf16 "$@" \
    --json "$results/$name.json"
}
gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "_"))')
bench "${gpu}_grid_768" --batch 40 --hidden 768
bench "${gpu}_grid_1152" --batch 40 --hidden 1152
bench "${gpu}_image_768" --batch 1 --hidden 768
bench "${gpu}_random_768" --batch 40 --hidden 768 --ids random
bench "${gpu}_single_768" --batch 40 --hidden 768 --ids single

echo "== done in $SECONDS s, results in $results"
for name in "${failed[@]}"; do echo "FAILED: $name"; done
exit "${#failed[@]}"
