#!/usr/bin/env bash
# Proof on one GPU: every attention implementation against an fp64 oracle, then determinism, then its speed.
#
#   bash examples/gpu_check.sh                          GPU only: some minutes; JSON and PNG in examples/out
#   bash examples/gpu_check.sh --quick                  GPU only: tiny sizes
#   PYTHON=.venv/bin/python bash examples/gpu_check.sh  GPU only: with another interpreter
#
# Installs nothing and needs no network: PYTHON (3.11 or newer) must have torch 2.11 or newer with CUDA. Transformer
# Engine and flash-attn are used where they are installed; the picture needs matplotlib, or is drawn later elsewhere.
# Exit code 0: all that ran is right. 1: something failed. 2: it cannot run here, and says why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
if ! found="$("$python" -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else sys.version)' 2>&1)"; then
    echo "Python 3.11 or newer is needed, '$python' gives: ${found:-nothing}. Set PYTHON to a newer one." >&2
    exit 2
fi
if ! found="$("$python" -c 'import torch' 2>&1)"; then
    echo "'$python' cannot import torch: ${found##*$'\n'}" >&2
    echo "Set PYTHON to an interpreter that has torch 2.11 or newer, built for CUDA." >&2
    exit 2
fi
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m megatron_prefix.gpu_check \
    --out examples/out/gpu_check.json "$@"
