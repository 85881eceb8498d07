#!/bin/sh
# Every benchmark of this machine, one after the other; JSON goes to bench/results/.
#
#   bench/run.sh          all of them
#   bench/run.sh quick    a part, with few rounds: about five minutes; JSON goes to build/bench-quick/
#
# A benchmark that fails is named at the end, and the others run.
set -u
cd "$(dirname "$0")/.." || exit 1
export OMP_NUM_THREADS=1
failed=
trap 'exit 130' INT

# run NAME COMMAND...: its figures go to NAME.json
run() {
  name=$1
  shift
  printf '\n== %s\n' "$name"
  "$@" || failed="$failed $name"
}

# The same with --json, for the benchmarks beside peers. `on N` is torchrun with N ranks.
peers() {
  name=$1
  shift
  run "$name" "$@" --json "$results/$name.json"
}

on() {
  ranks=$1
  shift
  torchrun --nproc-per-node "$ranks" "$@"
}

all() {
  run micro python -m pytest -q -o addopts= bench/micro --benchmark-json "$results/micro.json"
  for dtype in fp32 bf16 fp16; do
    peers optimizer_step_$dtype python bench/peers/optimizer_step.py --dtype $dtype
  done
  peers collectives on 2 bench/peers/collectives.py
  for dtype in fp32 bf16; do
    peers step_time_$dtype on 2 bench/peers/step_time.py --dtype $dtype
  done
  peers tiny_2_ranks on 2 bench/peers/step_time.py --model tiny
  peers tiny_1_rank python bench/peers/step_time.py --model tiny --engines alone,partita0,partita2
  peers step_time_1_rank python bench/peers/step_time.py --engines alone,partita0,partita2
  peers memory python bench/peers/step_time.py --memory
  peers import_time python bench/peers/import_time.py
  for number in 2 4; do
    peers model_states_$number on $number bench/peers/model_states.py
  done
  peers model_states_gloo on 2 bench/peers/model_states.py --transport torch
  peers bytes_sent on 2 bench/peers/bytes_sent.py
  peers pipeline on 2 bench/peers/pipeline.py
  for dtype in fp32 bf16; do
    peers linear_cross_entropy_$dtype python bench/peers/linear_cross_entropy.py --dtype $dtype
  done
  peers checkpoint on 2 bench/peers/checkpoint.py
  peers save_stall on 2 bench/peers/save_stall.py
  peers offload_cpu python bench/gpu/offload.py --device cpu --width 512 --layers 6
}

quick() {
  few="--rounds 3 --steps 3 --warm-up 3"
  engines=alone,ddp,fsdp2,deepspeed2,partita0,partita2,partita3
  for dtype in fp32 bf16; do
    peers step_time_$dtype on 2 bench/peers/step_time.py --dtype $dtype --engines $engines $few
  done
  peers tiny_2_ranks on 2 bench/peers/step_time.py --model tiny --engines $engines --rounds 5
  peers optimizer_step_bf16 python bench/peers/optimizer_step.py --dtype bf16 --engines deepspeed0,partita0 $few
  peers collectives on 2 bench/peers/collectives.py --dtypes f32 --sizes-kib 64,4096,32768 --rounds 5
  peers pipeline on 2 bench/peers/pipeline.py --rounds 3 --engines torch:1f1b,torch:zb-v,deepspeed:1f1b,partita:1f1b,partita:zb-v
  peers import_time python bench/peers/import_time.py
}

case ${1:-all} in
  all) results=bench/results ;;
  quick) results=build/bench-quick ;;
  *) echo "usage: bench/run.sh [quick]" >&2; exit 2 ;;
esac
mkdir -p "$results" || exit 1
"${1:-all}"
[ -z "$failed" ] || { printf '\nfailed:%s\n' "$failed" >&2; exit 1; }
