"""ms-swift's Megatron GRPO trainer over prefix groups; its sampling, rewards, advantages and losses run unchanged.

The micro-batches are ms-swift's own: ``micro_batch_size`` sequences each, equally many on every data-parallel rank, in
the order of the groups. Shared prefixes make them smaller, not other ones, so every loss type keeps its meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from swift.megatron.trainers.grpo_trainer import MegatronGRPOTrainer
from swift.megatron.utils import forward_step_helper
from swift.rlhf_trainers.utils import pad_logps_back_to_batch
from torch import Tensor

from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.ms_swift.arguments import refuse_arguments
from megatron_prefix.ms_swift.micro_batch import PackedMicroBatch
from megatron_prefix.ms_swift.model import share_prefixes


class PrefixGRPOTrainer(MegatronGRPOTrainer):
    """`MegatronGRPOTrainer` that runs old, reference and teacher log-probs and the update on packs."""

    def prepare_model(self) -> None:
        """As the parent's, with prefix-grouped attention in the policy, the reference and the teacher.

        Raises:
            ValueError: arguments that prefix groups cannot be combined with.
        """
        refuse_arguments(self.args)
        for meta in (self.args.megatron_model_meta, getattr(self.args, "teacher_megatron_model_meta", None)):
            if meta is not None:
                share_prefixes(meta.model_type)
        super().prepare_model()

    def compute_per_token_logps(
        self,
        model: torch.nn.Module,
        data_iterator: Iterator[dict[str, Any]],
        no_grad: bool = True,
        temperature: float = 1.0,
    ) -> tuple[Tensor | None, None]:
        """As the parent's: log-probs in the frame of the micro-batch, None before the last pipeline stage."""
        batch = PackedMicroBatch.build(next(data_iterator))
        stage = _Stage(model, temperature)
        training = model.training
        model.eval()
        try:
            with torch.set_grad_enabled(not no_grad):
                log_probs = forward_step_helper(stage, {"pack": batch.sequences.pack})
        finally:
            model.train(training)
        return (None if log_probs is None else batch.to_frame(log_probs)), None

    def forward_step(self, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Any]:
        """As the parent's: log-probs [B, longest sequence], or hidden states before the last stage, and their loss."""
        data = next(data_iterator)
        batch, grpo_batch = PackedMicroBatch.build(data), data["grpo_batch"]
        found = response_log_probs(
            model, batch.sequences.pack, temperature=self.temperature, with_entropy=self.compute_entropy
        )
        output, entropy = found if isinstance(found, tuple) else (found, None)
        if unwrap(model).post_process:
            output = self._by_sequence(batch.to_frame(output), grpo_batch)
            if entropy is not None:
                entropy = self._by_sequence(batch.to_frame(entropy.detach()), grpo_batch, pad_value=float("nan"))
        return output, partial(self.loss_func, data={"grpo_batch": grpo_batch, "per_token_entropy": entropy})

    def _by_sequence(self, frame: Tensor, grpo_batch: Any, pad_value: float = -1e10) -> Tensor:
        """Frame -> [B, longest sequence], as `MegatronGRPOTrainer.forward_step` gives it to the loss."""
        if not self.args.padding_free:
            return frame
        padded, _ = pad_logps_back_to_batch(
            logps_rmpad=frame,
            logits_to_keep=grpo_batch.completion_mask.shape[1],
            batch_size=len(grpo_batch.completion_mask),
            seq_lengths=grpo_batch.seq_lengths,
            pad_value=pad_value,
        )
        return padded


class _Stage:
    """A pipeline stage as `forward_step_helper` calls it, on a pack."""

    def __init__(self, model: Any, temperature: float) -> None:
        self.model, self.temperature = model, temperature
        self.config, self.set_input_tensor = model.config, model.set_input_tensor

    def __call__(self, pack: Any) -> Any:
        return response_log_probs(self.model, pack, temperature=self.temperature)
