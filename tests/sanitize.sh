#!/usr/bin/env bash
# Builds csrc with the address and undefined-behaviour sanitizers in build/sanitize and runs the
# tests that carry the marker `native` on that build. Needs g++, and python and pytest on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

folder="$PWD/build/sanitize"
rm -rf "$folder"
export CXX=g++ CC=gcc
export CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
export CXXFLAGS="$CFLAGS"
export LDFLAGS="-fsanitize=address,undefined"
python setup.py --quiet build --build-base "$folder/temp" --build-lib "$folder/lib"

# Python itself is no sanitized program, so the runtime has to be loaded before it; and it keeps
# memory until the process ends, which is no leak of ours. A report goes past Python's own standard
# error, so pytest must leave the file descriptor alone.
runtime="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
# The sanitized package has to be found before the one of the working tree, which tests/conftest.py
# checks.
export LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0 SANITIZED_LIB="$folder/lib"
PYTHONPATH="$folder/lib" pytest --capture=sys --override-ini="pythonpath=$folder/lib ." \
    -m native tests/unit/{blend,data,kernels,tokenizer} "$@"
