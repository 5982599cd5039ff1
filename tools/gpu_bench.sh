#!/usr/bin/env bash
# Builds, tests and measures everything that needs a GPU, in less than ten minutes on one GPU.
#
#   tools/gpu_bench.sh OUTPUT_DIR           writes JSON files and log.txt to OUTPUT_DIR
#   tools/gpu_bench.sh --tiny OUTPUT_DIR    runs the same steps with tiny shapes, on a CPU or GPU
#
# Environment: WHEELS is a folder of wheels that are installed first, without a package index (see
# tools/README.md for what is needed). MEGATRON_CHATFLOW_COMMIT names the measured commit if there is
# no .git. PYTHON is the interpreter. If a step fails, the others still run, and it is listed at the
# end.
set -uo pipefail
tiny=
if [[ ${1:-} == --tiny ]]; then tiny=1; shift; fi
[[ $# == 1 ]] || { echo "usage: tools/gpu_bench.sh [--tiny] OUTPUT_DIR" >&2; exit 2; }
mkdir -p "$1" || exit 2
output=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
# flash-attn 4 compiles kernels on first use. The cache avoids compiling them again in each process.
export FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1
failed=()
: > "$output/log.txt"

step() { # name, time limit in seconds, command...
  # The limits are those of a GPU. A CPU may take longer to import the libraries alone.
  local name=$1 limit=${tiny:+600} begin=$SECONDS
  limit=${limit:-$2}
  shift 2
  printf '\n== %s: %s\n' "$name" "$*" >> "$output/log.txt"
  if timeout "$limit" "$@" >> "$output/log.txt" 2>&1; then
    echo "$name: $((SECONDS - begin)) s"
  else
    echo "$name: failed after $((SECONDS - begin)) s, see $output/log.txt" >&2
    failed+=("$name")
  fi
}

if [[ -n ${WHEELS:-} ]]; then
  step wheels 40 "$python" -m pip install --no-index --no-deps "$WHEELS"/*.whl
fi
if [[ -n $tiny ]]; then
  shape=(--preset tiny --num-rounds 1)
  kernels=(--preset tiny --num-tokens 64 --num-rounds 1)
  whole=("${shape[@]}" --recompute)
else
  step build_kernels 60 csrc/kernels/build.sh megatron_chatflow/kernels/libchatflow_kernels.so
  step build 30 "$python" setup.py --quiet build_ext --inplace
  shape=(--preset 7b --num-rounds 5 --num-steps 2 --profile)
  kernels=(--preset 7b)
  # Weights, gradients and optimizer state of the whole 7B model take 121 GB.
  whole=()
  if "$python" -c 'import sys, torch; sys.exit(torch.cuda.get_device_properties(0).total_memory < 132e9)'; then
    whole=(--preset 7b-whole --num-rounds 3 --num-steps 2)
  fi
fi
# The conftest.py of the whole suite imports packages that these tests do not need.
step gpu_tests 150 "$python" -m pytest -q -rsP --confcutdir=tests/gpu tests/gpu
step kernels 90 "$python" tools/benchmark.py kernels "${kernels[@]}" --output "$output/kernels.json"
step train 90 "$python" tools/benchmark.py train "${shape[@]}" --ema --output "$output/train.json"
# The samples of a micro-batch form one row of tokens. With one sample, other tensors are views.
step train_micro_batch_1 45 "$python" tools/benchmark.py train "${shape[@]}" --micro-batch-size 1 --output "$output/train_micro_batch_1.json"
if [[ ${#whole[@]} -gt 0 ]]; then
  step train_whole 80 "$python" tools/benchmark.py train "${whole[@]}" --output "$output/train_whole.json"
else
  echo "train_whole: skipped, the GPU has less than 132 GB"
fi
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
