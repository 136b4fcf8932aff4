#!/usr/bin/env bash
# GRPO of Qwen3-8B with Megatron-LM's train_rl.py, every group's prompt encoded once per bin. For eight GPUs of 80 GB.
#
#   megatron-prefix patch --target megatron-lm --path "$MEGATRON_LM" --apply      once
#   MEGATRON_LM=~/Megatron-LM CHECKPOINT=~/qwen3-8b-mcore bash examples/megatron_lm/grpo_qwen3_8b.sh [more arguments]  # GPU only
#
# SHARE=0 runs the same without prefix groups, to compare; DRY_RUN=1 prints the command, one word a line. TP, PP, CP,
# NPROC, ENV_CONFIG, SEQ_LENGTH, GROUP_SIZE and PROMPTS are read as well. Needs what Megatron-LM's examples/rl/README.md
# asks for, Transformer Engine, and this package in the same environment.
set -euo pipefail

: "${MEGATRON_LM:?the folder of a patched Megatron-LM checkout}"
: "${CHECKPOINT:?a checkpoint of Qwen3-8B in the format of Megatron-LM}"
tp="${TP:-2}" pp="${PP:-1}" cp="${CP:-1}"
group_size="${GROUP_SIZE:-16}" prompts="${PROMPTS:-64}" seq_length="${SEQ_LENGTH:-8192}"

model=(
    --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --num-attention-heads 32 --kv-channels 128
    --group-query-attention --num-query-groups 8 --qk-layernorm --normalization RMSNorm --norm-epsilon 1e-6
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --rotary-base 1000000 --max-position-embeddings 40960
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen/Qwen3-8B
    --vocab-size 151936 --make-vocab-size-divisible-by 128
)
training=(
    --bf16 --transformer-impl transformer_engine --te-rng-tracker --use-distributed-optimizer
    --tensor-model-parallel-size "$tp" --pipeline-model-parallel-size "$pp" --context-parallel-size "$cp"
    --attention-dropout 0 --hidden-dropout 0 --recompute-granularity selective --recompute-modules core_attn
    --lr 1e-6 --min-lr 1e-7 --lr-warmup-samples 0 --clip-grad 1.0 --weight-decay 0.01
    --seq-length "$seq_length" --train-samples 65536 --eval-interval 20 --log-interval 1 --mock-data
    --pretrained-checkpoint "$CHECKPOINT" --ckpt-format torch_dist
)
grpo=(
    --perform-rl-step --langrl-env-config "${ENV_CONFIG:-examples/rl/environment_configs/gsm8k.yaml}"
    --grpo-group-size "$group_size" --grpo-prompts-per-step "$prompts" --grpo-iterations 1
    --micro-batch-size 1 --global-batch-size "$((group_size * prompts))"
    --grpo-clamp-eps-lower 0.2 --grpo-clamp-eps-upper 0.28 --grpo-kl-beta 0 --calculate-per-token-loss
    --rl-use-sequence-packing --rl-skip-bos-token --rl-inference-logprobs-is-correction
    --inference-max-seq-length "$seq_length" --inference-max-requests 64 --inference-dynamic-batching-buffer-size-gb 20
)
if [ "${SHARE:-1}" = 1 ]; then
    grpo+=(--rl-share-prefix --spec megatron_prefix.specs te_qk)
fi
[ "$tp" = 1 ] || training+=(--sequence-parallel)

command=(torchrun --nproc-per-node "${NPROC:-8}" train_rl.py "${model[@]}" "${training[@]}" "${grpo[@]}" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
    printf '%s\n' "${command[@]}"
    exit
fi
cd "$MEGATRON_LM"
CUDA_DEVICE_MAX_CONNECTIONS=1 exec "${command[@]}"
