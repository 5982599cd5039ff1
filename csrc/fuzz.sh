#!/usr/bin/env bash
# Generates difficult random schedules under AddressSanitizer and UndefinedBehaviorSanitizer and
# checks every prefix in integers. `make sanitize` runs the Python tests under the same sanitizers.
#
#   csrc/fuzz.sh [SECONDS [SEED]]
#
# Environment: CXX (default: g++).
set -euo pipefail
cd "$(dirname "$0")/blend"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${CXX:-g++}" -std=c++17 -O1 -g -Wall -Wextra -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=all \
    tests/fuzz_blend.cpp blend.cpp leaf.cpp leaf_jobs.cpp quota.cpp select.cpp -o "$work/fuzz_blend"
"$work/fuzz_blend" "${1:-20}" "${2:-1}"
