#!/usr/bin/env bash
# GPU-only: GRPO on verl's Megatron engine with prefix groups, one node of 8 GPUs as it stands.
#
#   MODEL=Qwen/Qwen3-8B TRAIN_FILES=gsm8k/train.parquet VAL_FILES=gsm8k/test.parquet bash examples/verl/grpo_megatron.sh  # GPU only
#
# Further settings of verl may follow, such as trainer.nnodes=8. It is an ordinary launch of verl: `prefix_groups` is all
# that this package adds. Wants an environment with verl 0.8 or 0.9, its rollout engine, and megatron-prefix.
set -euo pipefail

# shellcheck disable=SC2016 # verl's configuration resolves the last one, not the shell
prefix_groups=(
    actor_rollout_ref.actor._target_=megatron_prefix.verl.PrefixActorConfig
    actor_rollout_ref.actor.use_prefix_grouper=True
    # The reference model (here for the KL term) has a worker of its own.
    actor_rollout_ref.ref._target_=megatron_prefix.verl.PrefixActorConfig
    '+actor_rollout_ref.ref.use_prefix_grouper=${actor_rollout_ref.actor.use_prefix_grouper}'
)

settings=(
    algorithm.adv_estimator=grpo
    data.train_files="${TRAIN_FILES:?}"
    data.val_files="${VAL_FILES:?}"
    data.train_batch_size=128
    data.max_prompt_length=2048
    data.max_response_length=2048
    actor_rollout_ref.model.path="${MODEL:?}"
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.actor.ppo_mini_batch_size=64
    actor_rollout_ref.actor.use_kl_loss=True
    # Rows of a micro-batch. A group's prompt counts once: 2048 + 8 x 2048 fit, not 8 x 4096.
    actor_rollout_ref.actor.use_dynamic_bsz=True
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=20480
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.name=vllm
    actor_rollout_ref.rollout.n=8
    actor_rollout_ref.rollout.tensor_model_parallel_size=2
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=20480
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=20480
    # verl 0.8 uses the older mbridge otherwise; both work.
    actor_rollout_ref.actor.megatron.vanilla_mbridge=False
    trainer.n_gpus_per_node=8
    trainer.nnodes=1
)

python3 -m verl.trainer.main_ppo --config-name ppo_megatron_trainer "${settings[@]}" "${prefix_groups[@]}" "$@"
