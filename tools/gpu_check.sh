#!/usr/bin/env bash
# What to do on a machine with an NVIDIA GPU, in phases of less than eight minutes, without a network:
#
#     tools/gpu_check.sh                     # all of them, in this order
#     tools/gpu_check.sh smoke bench         # some
#     tools/gpu_check.sh --device simt       # a rehearsal, with tests/simt in place of the GPU
#
#     smoke      whether eager sums four rows in our order; and the few tests that launch every kernel
#     bench      times of ours, of the peers, of a copy and of a call, into benchmarks/results/gpu_*.json
#     test       the tests of the CUDA variant
#     sanitize   the four tools of compute-sanitizer, on our kernels
#     profile    times of each kernel, into benchmarks/results/gpu_*.json
#
# Wants a build of the CUDA variant in build/ (make cuda, made anywhere), and in $PYTHON, or python3:
# torch 2.11 or later for CUDA 13, pytest, hypothesis and `kernels`. No phase stops the next one; it ends with
# a list of what failed, and their number as its status.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda
if [[ ${1:-} == --device ]]; then
  device=$2
  shift 2
fi
phases=("$@")
[[ ${#phases[@]} -eq 0 ]] && phases=(smoke bench test sanitize profile)
failed=()

run() {
  local name=$1
  shift
  echo "== $name ($SECONDS s)"
  timeout 480 "$@" || failed+=("$name")
}

# By the names that pytest gives the variants.
if [[ $device == simt ]]; then variant="cuda-simt"; else variant="cuda and not simt"; fi
pytest=("$python" -m pytest -q -p no:cacheprovider -k "$variant")

[[ $device == cuda ]] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
if [[ $device == simt ]]; then
  results=.build/rehearsal/ # whose numbers are nobody's results
  sizes=(--batch 1 --patches 64 --hidden 64 --rows 100 --rounds 2 --peers eager embedding_bag)
else
  name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>&1 | head -n 1)
  results=benchmarks/results/gpu_$(tr -cs '[:alnum:]' _ <<<"${name,,}")
  sizes=()
fi

for phase in "${phases[@]}"; do
  json=(--device "$device" --json "$results$phase.json")
  case $phase in
    smoke)
      run smoke "$python" benchmarks/gpu.py smoke "${json[@]}"
      run "smoke tests" "${pytest[@]}" -m sanitizer
      ;;
    profile) run profile "$python" benchmarks/gpu.py profile "${json[@]}" ;;
    bench)
      run bench "$python" benchmarks/compare.py --list gpu "${json[@]}" "${sizes[@]}"
      run call "$python" benchmarks/call.py --device "$device" --json "${results}call.json"
      ;;
    test)
      marker=gpu
      [[ $device == simt ]] && marker=sanitizer  # fewer: the engine is slow
      run test "${pytest[@]}" -m "$marker"
      ;;
    sanitize)
      for tool in memcheck racecheck initcheck synccheck; do
        sanitizer=(timeout 115 compute-sanitizer --tool "$tool" --error-exitcode 1
          --kernel-name kernel_substring=embedding_lookup)
        [[ $device == simt ]] && sanitizer=(env "SANITIZER_REHEARSED=$tool")
        run "sanitize $tool" "${sanitizer[@]}" "${pytest[@]}" -m sanitizer
        [[ $device == simt ]] && break
      done
      ;;
    *)
      echo "no phase $phase: it is smoke, bench, test, sanitize or profile" >&2
      exit 2
      ;;
  esac
done

echo "== done in $SECONDS s"
for name in "${failed[@]}"; do echo "FAILED: $name"; done
exit "${#failed[@]}"
