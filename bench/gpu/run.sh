#!/bin/sh
# On a machine with a GPU, torch and nvcc: builds, runs the CUDA tests and the GPU benchmarks, writes JSON and a table.
#
#   bench/gpu/run.sh [--only SECTION,SECTION] [--results DIR] [--device cpu] [--quick | --small] [--no-build | --installed]
#                    [--no-table] [DIR]
#
# Sections: tests, sanitize, kernels, step, sync, time, gpt2, compile, largest, offload; none: the build alone. Each takes less than
# eight minutes, the build in front of the first one counted in. Nothing is fetched. --quick: one round of what matters most, as
# verify.sh has it; --small: sizes for a CPU. --no-build: what was built before; --installed: the package that Python has.
# Environment: WHEELS (a folder of wheels to install), GOOGLETEST (its source), PYTHON, CUDA_ARCHITECTURES, SANITIZER_FILTER,
# SECTION_SECONDS.
set -u
cd "$(dirname "$0")/../.." || exit 1
section_begin=$(date +%s)
results=bench/results/gpu
sections=tests,sanitize,kernels,step,sync,time,gpt2,compile,largest,offload
device=cuda
build=yes
site=$PWD/build/gpu/site # nothing is installed into the machine's own Python
size=leisure
table=yes
while [ $# -gt 0 ]; do
  case $1 in
    --only) sections=${2:?--only needs sections}; shift 2 ;;
    --results) results=${2:?--results needs a folder}; shift 2 ;;
    --device) device=${2:?--device needs cuda or cpu}; shift 2 ;;
    --quick) size=quick; shift ;;
    --small) size=small; shift ;;
    --no-build) build=no; shift ;;
    --no-table) table=no; shift ;;
    --installed) build=no site=; shift ;;
    -*) echo "no such option: $1" >&2; exit 2 ;;
    *) results=$1; shift ;;
  esac
done

# What a virtual environment and the CUDA toolkit install may lie outside of PATH.
python=$(command -v "${PYTHON:-python3}") || { echo "missing: ${PYTHON:-python3}" >&2; exit 1; }
PATH="$("$python" -c 'import sys, sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
command -v nvcc >/dev/null || PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
stamp=build/gpu/built
export PATH PYTHONPATH="$site${PYTHONPATH:+${site:+:}$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$results" build/gpu || exit 1
status=0

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*"; }

check_tools() {
  lacking=
  for tool in cmake ninja; do
    command -v $tool >/dev/null || lacking="$lacking $tool"
  done
  [ "$device" = cpu ] || command -v nvcc >/dev/null || lacking="$lacking nvcc"
  for module in torch pip scikit_build_core pybind11 pytest packaging; do
    "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" || lacking="$lacking $module"
  done
  [ -z "$lacking" ] || { echo "missing:$lacking" >&2; return 1; }
}

install_wheels() {
  set -- "$WHEELS"/*.whl
  [ -e "$1" ] || { echo "no wheels in $WHEELS" >&2; return 1; }
  "$python" -m pip install -q --no-index --no-deps --upgrade --target "$site" "$@"
}

build_package() {
  cuda=ON
  [ "$device" = cpu ] && cuda=AUTO
  set -- "--config-settings=cmake.define.PARTITA_CUDA=$cuda"
  [ -z "${CUDA_ARCHITECTURES:-}" ] || set -- "$@" "--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=$CUDA_ARCHITECTURES"
  CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" "$python" -m pip install --no-index --no-deps \
    --no-build-isolation --upgrade --target "$site" "$@" . >build/gpu/build.log 2>&1 ||
    { tail -n 60 build/gpu/build.log; return 1; }
}

up_to_date() {
  [ -e $stamp ] && [ -d "$site/partita" ] &&
    [ -z "$(find cpp cuda python CMakeLists.txt pyproject.toml -type f -newer $stamp ! -name '*.pyc' | head -n 1)" ]
}

prepare() {
  [ -z "${WHEELS:-}" ] || install_wheels || return 1
  if up_to_date; then
    say "the build is up to date"
  else
    check_tools || return 1
    say "building"
    rm -f $stamp
    build_package || return 1
    touch $stamp
  fi
  "$python" bench/gpu/requirements.py || return 1
  [ "$device" = cpu ] || "$python" -c '
import sys, torch
from partita import _core
print(f"torch {torch.__version__}, CUDA kernels {_core.built_with_cuda()}, GPUs {_core.cuda_device_count()}")
sys.exit(not (torch.cuda.is_available() and _core.built_with_cuda() and _core.cuda_device_count()))'
}

left() { echo $((${SECTION_SECONDS:-470} - $(date +%s) + section_begin)); }

# benchmark SCRIPT RESULT ARGUMENTS...; the limit is for a script that hangs in spite of its own budget
benchmark() {
  script=$1 result=$2
  shift 2
  timeout -k 10 $(($(left) + 5)) "$python" "bench/gpu/$script.py" --device "$device" --budget-s "$(left)" \
    --json "$results/$result.json" "$@" || { say "$script: exit status $?"; status=1; }
}

checks() {
  timeout -k 10 $(($(left) + 5)) "$python" bench/gpu/checks.py --parts "$1" --budget-s "$(left)" --json "$results/$1.json" ||
    { say "$1: something failed"; status=1; }
}

# pick LEISURE QUICK SMALL; the last are sizes at which a run without a GPU shows that the scripts work.
pick() { case $size in leisure) echo "$1" ;; quick) echo "$2" ;; *) echo "$3" ;; esac; }

# Arguments are lists of words.
# shellcheck disable=SC2046
run_section() {
  case $1 in
    tests | sanitize) checks "$1" ;;
    kernels)
      benchmark adam adam $(pick "" "--numel 1000000000 --rounds 3 --times 5" \
        "--numel 1000000 --rounds 2 --times 2 --copy-mib 16")
      ;;
    step)
      benchmark optimizer_step optimizer_step $(pick "" \
        "--dtypes bf16 --contenders partita0,torch-masters,partita0-split --rounds 1" \
        "--dtypes bf16 --contenders partita0,torch-masters --numel 2000000 --rounds 1 --steps 2 --copy-mib 16")
      ;;
    sync) benchmark host host_sync --what sync,calls $(pick "" "" "--first 1 --steps 2 --profiled 2") ;;
    time) benchmark host host --what time $(pick "" "--repeats 30" "--first 1 --repeats 3") ;;
    gpt2)
      benchmark gpt2 gpt2 $(pick "" "--contenders partita0,torch-autocast,partita0-split --rounds 1" \
        "--contenders partita0,torch-autocast --models tiny --length 64 --steps 1 --turns 1 --warm-up 1 --rounds 1")
      ;;
    compile)
      benchmark gpt2 gpt2_compiled --compile --rounds 1 --case-s 300 $(pick "--models 124m,1.5b" "--models 124m" \
        "--models tiny --length 64 --steps 1")
      ;;
    largest) benchmark largest largest $(pick "" "--tries 5" "--width 256 --memory-mib 1200 --tries 5") ;;
    offload)
      benchmark offload offload $(pick "" "--layers 12 --rounds 1" \
        "--width 256 --layers 2 --steps 1 --rounds 1")
      ;;
    none) ;;
    *) echo "no such section: $1" >&2; status=2 ;;
  esac
}

if [ $build = yes ]; then
  prepare || { say "cannot go on without the above"; exit 1; }
fi
for section in $(echo "$sections" | tr , ' '); do
  say "$section"
  run_section "$section"
  section_begin=$(date +%s)
done
say "results in $results"
[ $table = no ] || "$python" bench/gpu/summary.py "$results" --markdown "$results/summary.md" || status=1
exit $status
