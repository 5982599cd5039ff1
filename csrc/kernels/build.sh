#!/usr/bin/env bash
# Compiles the kernels into one shared library that needs nothing but a driver.
#
#   csrc/kernels/build.sh OUTPUT.so          with nvcc, for sm_80 and sm_90a (and later, from PTX)
#   csrc/kernels/build.sh --host OUTPUT.so   with the C++ compiler, for tests: see tests/emulation.h
#
# NVCC and CXX name other compilers than the first on PATH.
set -euo pipefail
source=$(cd "$(dirname "$0")" && pwd)
host=
if [[ ${1:-} == --host ]]; then host=1; shift; fi
[[ $# == 1 ]] || { echo "usage: build.sh [--host] OUTPUT.so" >&2; exit 2; }
output=$1
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT

if [[ -n $host ]]; then
  compile=("${CXX:-c++}" -x c++ -std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror
           -Wno-unknown-pragmas -Wno-clobbered -I "$source/tests")
  link=("${CXX:-c++}" -shared)
else
  compile=("${NVCC:-nvcc}" -std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall
           -gencode "arch=compute_80,code=[sm_80,compute_80]" -gencode "arch=compute_90a,code=sm_90a")
  link=("${NVCC:-nvcc}" -shared -cudart static)
fi
for file in "$source"/*.cu; do basename "$file" .cu; done |
  xargs -P "$(nproc)" -I {} "${compile[@]}" -c "$source/{}.cu" -o "$objects/{}.o"
"${link[@]}" "$objects"/*.o -o "$objects/linked"
mv "$objects/linked" "$output"
