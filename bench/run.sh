#!/bin/sh
# Every benchmark of this machine, one after the other; JSON goes to bench/results/.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
results=bench/results
mkdir -p "$results"
ranks="torchrun --nproc-per-node 2"

python -m pytest -q -o addopts= bench/micro --benchmark-json "$results/micro.json"
for dtype in fp32 bf16 fp16; do
  python bench/peers/optimizer_step.py --dtype "$dtype" --json "$results/optimizer_step_$dtype.json"
done
$ranks bench/peers/collectives.py --json "$results/collectives.json"
for dtype in fp32 bf16; do
  $ranks bench/peers/step_time.py --dtype "$dtype" --json "$results/step_time_$dtype.json"
done
$ranks bench/peers/step_time.py --model tiny --json "$results/tiny_2_ranks.json"
python bench/peers/step_time.py --model tiny --engines alone,partita0,partita2 --json "$results/tiny_1_rank.json"
python bench/peers/step_time.py --engines alone,partita0,partita2 --json "$results/step_time_1_rank.json"
python bench/peers/step_time.py --memory --json "$results/memory.json"
python bench/peers/import_time.py --json "$results/import_time.json"
for ranks_of_run in 2 4; do
  torchrun --nproc-per-node $ranks_of_run bench/peers/model_states.py --json "$results/model_states_$ranks_of_run.json"
done
$ranks bench/peers/model_states.py --transport torch --json "$results/model_states_gloo.json"
$ranks bench/peers/bytes_sent.py --json "$results/bytes_sent.json"
python bench/gpu/offload.py --device cpu --width 512 --layers 6 --json "$results/offload_cpu.json"
