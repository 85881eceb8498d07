#!/bin/sh
# Verifies an installation on a GPU in a quarter of an hour: a machine with one GPU, torch, nvcc, CMake and ninja, and no network.
#
#   bench/gpu/verify.sh prepare [FOLDER]             where there is a network and nvcc: what the GPU's machine may lack
#   bench/gpu/verify.sh check [FOLDER] [OPTIONS]     there: builds, then all that is right or wrong, and the kernels' speed; 490 s
#   bench/gpu/verify.sh measure [FOLDER] [OPTIONS]   there, after it: GPT-2 beside torch, offload; 235 s
#
# FOLDER (.gpu, in the tree): wheels and the compiled C++ tests; without it, check uses what the machine has, and leaves the C++ tests
# out. Prepared for another machine, PYTHON_VERSION (3.12, say) and CUDA_ARCHITECTURES (90-real, say) are what that one has.
# Options: --out DIR (or the variable OUT; build/gpu): gets results.tgz, whose JSON belongs to bench/results/gpu; --installed
# verifies the package that Python has; --device cpu and --small try the script without a GPU; --seconds N. Exit status 1: something
# failed. Everything has a time limit of its own. bench/gpu/run.sh measures more, at leisure.
set -eu
cd "$(dirname "$0")/../.."
what=${1:-}
case $what in
  check | measure) shift; exec "${PYTHON:-python3}" bench/gpu/verify.py "$what" "$@" ;;
  prepare) folder=${2:-.gpu} ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

python=${PYTHON:-python3}
mkdir -p "$folder/wheels"
# What the package needs and what building and testing it takes, without what comes with torch; pinned, with all that it needs.
"$python" bench/gpu/requirements.py --list pyproject.toml >"$folder/requirements.txt"
version=${PYTHON_VERSION:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
set -- --python-version "$version" --implementation cp --abi "cp$(echo "$version" | tr -d .)" --abi abi3 --abi none
for platform in manylinux_2_28 manylinux_2_17 manylinux2014 manylinux_2_12 manylinux1; do
  set -- "$@" --platform "${platform}_x86_64"
done
PIP_CONSTRAINT='' "$python" -m pip download -q --only-binary=:all: "$@" --platform any -c constraints.txt \
  -r "$folder/requirements.txt" -d "$folder/wheels"

architectures=${CUDA_ARCHITECTURES:-80-real;90-real;100-real}
cmake --preset release -DPARTITA_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=$architectures"
cmake --build --preset release --target partita_cuda_tests --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
cp build/release/tests/cpp/partita_cuda_tests "$folder/"
du -sh "$folder"
