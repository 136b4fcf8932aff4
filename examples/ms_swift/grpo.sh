#!/usr/bin/env bash
# GRPO of Qwen3-8B with ms-swift on 8 GPUs, every shared prompt encoded once. GPU only: it samples with vLLM.
# The two lines that differ from a run without prefix sharing are --external_plugins and --micro_batch_size, which is
# num_generations here: a micro-batch is one group, and its prompt is encoded once.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export NPROC_PER_NODE=${NPROC_PER_NODE:-8}

megatron rlhf \
    --rlhf_type grpo \
    --external_plugins "$here/plugin.py" \
    --micro_batch_size 16 \
    --num_generations 16 \
    --global_batch_size 256 \
    --steps_per_generation 2 \
    --model "${MODEL:-Qwen/Qwen3-8B}" \
    --dataset "${DATASET:-AI-MO/NuminaMath-TIR#10000}" \
    --reward_funcs "${REWARD:-accuracy}" \
    --output_dir "${OUT:-out/ms_swift}" \
    --tensor_model_parallel_size 2 \
    --sequence_parallel true \
    --context_parallel_size 1 \
    --pipeline_model_parallel_size 1 \
    --padding_free true \
    --recompute_granularity selective \
    --max_length 8192 \
    --max_completion_length 2048 \
    --use_vllm true \
    --vllm_mode colocate \
    --vllm_gpu_memory_utilization 0.5 \
    --sleep_level 2 \
    --offload_model true \
    --offload_optimizer true \
    --tuner_type full \
    --bf16 true \
    --lr 1e-6 \
    --beta 0.001 \
    --loss_type grpo \
    --train_iters 100
