#!/usr/bin/env bash
# Runs the fast tests on every Python from 3.10 to 3.13 that this machine has, with every minor
# version of megatron-core from 0.16 to 0.19 that has a wheel for it and the newest torch, and with
# older versions of torch. There is an environment for each Python, and each of these versions of
# torch, in build/matrix; it needs about 8 GB with torch's CUDA build.
#
#   tests/matrix.sh                           all of them
#   tests/matrix.sh 3.12:0.19.2 ...           some of them: PYTHON:MEGATRON_CORE
#   tests/matrix.sh 3.11:0.16.1:2.6.0 ...     with a version of torch: PYTHON:MEGATRON_CORE:TORCH
#
# megatron-core 0.18.2 and later imports triton, which only torch's CUDA build brings.
set -euo pipefail
cd "$(dirname "$0")/.."

all=(3.10:0.16.1 3.11:0.16.1 3.12:0.16.1 3.12:0.17.1 3.12:0.18.2 3.12:0.19.2
    3.13:0.16.1 3.13:0.17.1 3.13:0.18.2 3.13:0.19.2 3.11:0.16.1:2.6.0 3.11:0.16.1:2.10.0)
if [[ $# -gt 0 ]]; then chosen=("$@"); else chosen=("${all[@]}"); fi

num_run=0 failed=()
for versions in "${chosen[@]}"; do
    IFS=: read -r python megatron_core torch <<< "$versions"
    folder=$PWD/build/matrix/$python${torch:+-torch-$torch}
    # PYENV_VERSION selects the interpreter of this version behind pyenv's shims.
    if ! PYENV_VERSION=$python "python$python" --version > /dev/null 2>&1; then
        echo "matrix: python$python is not installed, skipping $versions"
        continue
    fi
    echo "matrix: Python $python with megatron-core $megatron_core${torch:+ and torch $torch}"
    [[ -x $folder/bin/python ]] || PYENV_VERSION=$python "python$python" -m venv "$folder"
    if ! {
        "$folder/bin/pip" install -qq 'setuptools>=77' wheel 'pybind11>=2.12' &&
            "$folder/bin/pip" install -qq --only-binary megatron-core \
                --no-build-isolation --editable '.[dev]' "megatron-core==$megatron_core" \
                ${torch:+"torch==$torch"}
    }; then
        failed+=("$versions (installation)")
        continue
    fi
    num_run=$((num_run + 1))
    # Without CI, a test whose optional library has no wheel for this Python is skipped.
    CI='' PATH="$folder/bin:$PATH" "$folder/bin/pytest" -m 'not slow' \
        tests/{unit,commands,simulated_gpu} || failed+=("$versions")
done

if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'matrix: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
[[ $num_run -gt 0 ]] || { echo "matrix: nothing ran" >&2; exit 1; }
echo "matrix: $num_run combinations passed"
