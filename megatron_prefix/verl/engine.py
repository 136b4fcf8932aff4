"""verl's Megatron engine with prefix groups: the model's layer spec, the micro-batches and the forward step are ours.

Everything else is verl's and runs as it is: parallel groups, bridge and weights, optimizer, checkpoints, offloading,
weight export to the rollout engine, its loss function, the scaling of losses and gradients, metrics. Checked against
verl 0.8.0, 0.9.0 and 0.9.1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.megatron.pipeline_parallel import make_batch_generator
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron import MegatronEngineWithLMHead
from verl.workers.engine.utils import postprocess_batch_func, prepare_micro_batches

from megatron_prefix.collectives import all_reduce_sum
from megatron_prefix.mcore.layer_specs import with_prefix_attention
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.stages import unwrap
from megatron_prefix.sequence_packs import pack_sequences
from megatron_prefix.verl.batches import as_model_output, micro_batches_of_all_ranks, prompts_and_responses
from megatron_prefix.verl.config import BACKEND
from megatron_prefix.verl.support import refuse_batch_settings, refuse_model_settings, refuse_worker_settings


@EngineRegistry.register(model_type="language_model", backend=BACKEND)
class PrefixMegatronEngine(MegatronEngineWithLMHead):
    """`MegatronEngineWithLMHead` in which sequences of a micro-batch with the same prompt encode it once.

    With ``use_dynamic_bsz`` micro-batches are whole prefix groups, and ``max_token_len_per_gpu`` counts a group's
    prompt once; with a fixed micro-batch size they are verl's, and share what happens to be in them.

    Raises:
        ValueError: a setting that prefix groups cannot do, by name, when the worker, the model or the batch is made.
    """

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        refuse_worker_settings(model_config, engine_config)
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)

    def _build_megatron_module(self) -> Any:
        """verl's model with prefix-grouped attention. The bridge gets its own layer spec back afterwards."""
        refuse_model_settings(self.provider if self.tf_config is None else self.tf_config)
        if self.vanilla_bridge:
            bridge, name = self.bridge, "_get_transformer_layer_spec"
        else:
            bridge, name = self.provider, "transformer_layer_spec"
        if not hasattr(bridge, name):
            raise ValueError(
                f"{type(bridge).__name__} has no {name}: the bridge builds this model in a way of its own; "
                "set use_prefix_grouper=False"
            )
        spec = getattr(bridge, name)
        setattr(bridge, name, _with_prefix_attention(spec))
        try:
            return super()._build_megatron_module()
        finally:
            setattr(bridge, name, spec)

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Callable[..., Any] | None, forward_only: bool = False
    ) -> dict[str, Any]:
        """Run a batch forward (and backward) through all stages, as verl's method does.

        Returns:
            on the last stage ``model_output`` (``log_probs`` and ``entropy``, each jagged [B, j] in the order of
            ``data``), ``loss`` and ``metrics`` of each micro-batch; else an empty dict.
        """
        refuse_batch_settings(data)
        self._set_totals(data)
        micro_batches, indices = self._micro_batches(data)
        for each in (data, *micro_batches):
            tu.assign_non_tensor(each, num_micro_batch=len(micro_batches))
        postprocess = partial(self.postprocess_micro_batch_func, forward_only=forward_only, loss_function=loss_function)
        outputs = get_forward_backward_func()(
            forward_step_func=partial(
                self.forward_step, logits_processor_func=None, postprocess_micro_batch_func=postprocess
            ),
            data_iterator=make_batch_generator(micro_batches, vpp_size=len(self.module)),
            model=self.module,
            num_microbatches=len(micro_batches),
            seq_length=1,  # shapes come from the packs
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            return {}
        return postprocess_batch_func(output_lst=outputs, indices=indices, data=data)

    def forward_step(
        self,
        batch_iter: Iterator[TensorDict],
        model: torch.nn.Module,
        logits_processor_func: Any,
        postprocess_micro_batch_func: Callable[..., Any],
    ) -> tuple[Any, Callable[..., Any]]:
        """One micro-batch through this stage. ``logits_processor_func`` is for distillation, which is refused."""
        batch = next(batch_iter)
        packed = pack_sequences(*prompts_and_responses(batch))
        with_entropy = tu.get_non_tensor_data(batch, key="calculate_entropy", default=False)
        output: Any = response_log_probs(model, packed.pack, temperature=_temperature(batch), with_entropy=with_entropy)
        batch = batch.to(get_device_id())
        if unwrap(model).post_process:
            values = output if with_entropy else (output,)
            names = ("log_probs", "entropy")
            output = {
                name: as_model_output(packed, value, batch["input_ids"])
                for name, value in zip(names, values, strict=False)
            }
        return output, partial(postprocess_micro_batch_func, data=batch)

    def _set_totals(self, data: TensorDict) -> None:
        """What verl's losses divide by: numbers of the whole batch over data-parallel ranks."""
        mask, group = data["loss_mask"], self.get_data_parallel_group()
        trained = (mask.values() if mask.is_nested else mask).sum()
        routed = data["input_ids"].offsets()[-1]  # of whole sequences: verl weights and divides by it alike
        tu.assign_non_tensor(
            data,
            sp_size=self.engine_config.context_parallel_size,
            dp_size=self.get_data_parallel_size(),
            batch_num_tokens=all_reduce_sum(trained.to(get_device_id()), group).item(),
            routed_num_tokens=all_reduce_sum(routed.to(get_device_id(), copy=True), group).item(),
        )

    def _micro_batches(self, data: TensorDict) -> tuple[list[TensorDict], list[list[int]] | None]:
        """This rank's micro-batches, and which sequences of ``data`` each holds (None: in order)."""
        multiple = self.tf_config.microbatch_group_size_per_vp_stage if len(self.module) > 1 else 1
        group = self.get_data_parallel_group()
        if tu.get_non_tensor_data(data, key="use_dynamic_bsz", default=True):
            max_rows = data["max_token_len_per_gpu"] * self.engine_config.context_parallel_size
            indices = micro_batches_of_all_ranks(data, max_rows, group, multiple)
            return [tu.index_select_tensor_dict(data, each) for each in indices], indices
        micro_batches, _ = prepare_micro_batches(data=data, dp_group=group)
        if len(micro_batches) % multiple:
            raise ValueError(
                f"micro_batch_size_per_gpu={data['micro_batch_size_per_gpu']} makes {len(micro_batches)} micro-batches "
                f"where an interleaved pipeline needs a multiple of {multiple}; change the size"
            )
        return micro_batches, None


def _temperature(batch: TensorDict) -> float:
    """The temperature of a micro-batch. Raises ValueError where sequences have different ones."""
    values = torch.as_tensor(batch["temperature"], dtype=torch.float32).unique()
    if len(values) > 1:
        raise ValueError(f"temperature differs between sequences ({values.tolist()}); use_prefix_grouper takes one")
    return values.item()


def _with_prefix_attention(spec: Any) -> Any:
    """A bridge's layer spec, or the function that makes it, with prefix-grouped attention."""
    if isinstance(spec, ModuleSpec):
        return with_prefix_attention(spec)

    @functools.wraps(spec)  # Megatron-Bridge gives a stage only to a function whose signature has one
    def build(*args: Any, **settings: Any) -> Any:
        return with_prefix_attention(spec(*args, **settings))

    return build
