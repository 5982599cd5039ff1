#!/usr/bin/env bash
# Builds csrc/data with AddressSanitizer and UndefinedBehaviorSanitizer, fuzzes the blend, and runs
# the tests that use the extension. Any report ends it with a status other than 0.
#
#   csrc/sanitize.sh [SECONDS_OF_FUZZING [SEED]]
#
# Environment: PYTHON (default: python3), CXX (default: g++).
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
cxx="${CXX:-g++}"
flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# shellcheck disable=SC2086
$cxx $flags -Wall -Wextra csrc/data/tests/fuzz_blend.cpp \
  csrc/data/{blend,leaf,leaf_jobs,quota,select}.cpp -o "$work/fuzz_blend"
"$work/fuzz_blend" "${1:-20}" "${2:-1}"

# The tests run on a copy of the tree whose extension is the sanitized one.
mkdir "$work/tree"
tar --exclude='*.so' --exclude=__pycache__ -cf - csrc megatron_chatflow tests pyproject.toml setup.py README.md |
  tar -xf - -C "$work/tree"
cd "$work/tree"
CC="$cxx" CXX="$cxx" CFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" \
  "$python" setup.py --quiet build_ext --inplace
# Python itself is not sanitized: the runtime comes first, and what Python never frees is no leak.
LD_PRELOAD="$($cxx -print-file-name=libasan.so) $($cxx -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 PYTHONPATH="$work/tree" \
  "$python" -m pytest -p no:cacheprovider -x tests/unit/native \
  tests/unit/data/test_{blend,blend_edits,digest,packing,permutation,samples}.py
