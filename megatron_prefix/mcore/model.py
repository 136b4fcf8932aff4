"""Build megatron-core models from a ModelConfig, with the settings that exact training needs.

The same settings run on the CPU (after `mcore.cpu.run_on_cpu`) and on GPUs, for megatron-core 0.16.1 and 0.19.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix.mcore.parallel import current_sizes, seed_everything
from megatron_prefix.model_config import ModelConfig

__all__ = ["RECOMPUTE", "ModelConfig", "build_hybrid_model", "build_model", "hybrid_stack_spec", "local_layer_spec",
           "transformer_config"]  # fmt: skip

RECOMPUTE = ("none", "selective", "full")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def transformer_config(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
    overrides: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """megatron-core's TransformerConfig for `config` and the parallel sizes that now run.

    dtype: of parameters and activations: float64, float32 or bfloat16.
    recompute: activation recompute, "none", "selective" (the core attention) or "full" (every layer).
    overrides: further TransformerConfig fields by name, applied last.

    No dropout and no fused bias, softmax or RoPE kernels: each of them makes the result depend on how tokens are packed
    or exists only for one dtype. With pipeline stages, tensors of varying length are sent one by one: batched
    point-to-point calls over gloo give wrong gradients.

    Raises ValueError for sizes that tensor or pipeline parallelism cannot split, and for unknown values or overrides.
    """
    _check_settings(config, dtype, sequence_parallel, recompute)
    sizes = current_sizes()
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.groups,
        "kv_channels": config.channels,
        "normalization": "RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": config.norm_epsilon,
        "activation_func": F.silu if config.activation == "swiglu" else F.gelu,
        "gated_linear_unit": config.activation == "swiglu",
        "qk_layernorm": config.qk_layernorm,
        "add_qkv_bias": config.qkv_bias,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        # Only half precision needs its softmax lifted; in fp64 "fp32" would lower it.
        "attention_softmax_in_fp32": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": sizes.vpp,
        "context_parallel_size": sizes.cp,
        "sequence_parallel": sequence_parallel,
    }
    if sizes.pp > 1:
        # The dispatcher type is checked even for a dense model when lengths vary.
        values |= {
            "pipeline_dtype": dtype,
            "variable_seq_lengths": True,
            "moe_token_dispatcher_type": "alltoall",
            "batch_p2p_comm": False,
            "overlap_p2p_comm": sizes.vpp is not None,
        }
    if recompute != "none":
        values |= {"recompute_granularity": recompute}
    if recompute == "full":
        values |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = sorted(set(overrides or {}) - known)
    if unknown:
        raise ValueError(f"overrides {unknown} are no fields of this megatron-core's TransformerConfig")
    made = TransformerConfig(**(values | dict(overrides or {})))
    if config.position_embedding == "yarn":
        _set_yarn(made, config)
    return made


def _check_settings(config: ModelConfig, dtype: torch.dtype, sequence_parallel: bool, recompute: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    sizes = current_sizes()
    if sequence_parallel and sizes.tp == 1:
        raise ValueError("sequence_parallel needs tensor parallelism, but tp is 1: leave it out or raise tp")
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size"):
        value = getattr(config, name)
        if value % sizes.tp:
            raise ValueError(f"{name} {value} does not divide by tp={sizes.tp}: choose a tp that divides it")
    stages = sizes.pp * (sizes.vpp or 1)
    if config.num_layers % stages:
        raise ValueError(
            f"num_layers {config.num_layers} does not divide by {stages} pipeline stages (pp={sizes.pp}, "
            f"vpp={sizes.vpp}): choose sizes that divide it"
        )


def _set_yarn(made: TransformerConfig, config: ModelConfig) -> None:
    """GPTModel and HybridModel read these names from the config, which has no such fields."""
    scaling = config.rope_scaling
    assert scaling is not None
    for name, key in (
        ("yarn_rotary_scaling_factor", "factor"),
        ("yarn_original_max_position_embeddings", "original_max_position_embeddings"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
        ("yarn_mscale", "mscale"),
        ("yarn_mscale_all_dim", "mscale_all_dim"),
        ("yarn_correction_range_round_to_int", "round_to_int"),
    ):
        setattr(made, name, scaling[key])


def local_layer_spec(config: ModelConfig) -> ModuleSpec:
    """megatron-core's own local layer spec (no Transformer Engine) for `config`."""
    return get_gpt_layer_local_spec(
        qk_layernorm=config.qk_layernorm, normalization="RMSNorm" if config.norm == "rmsnorm" else None
    )


def build_model(
    config: ModelConfig,
    *,
    layer_spec: ModuleSpec | None = None,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
    seed: int | None = None,
    vp_stage: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """This rank's part of a GPTModel, on the GPU where there is one.

    layer_spec: the layers; None is megatron-core's own local spec (one sequence per row, no packing).
    seed: reseeds torch and the model-parallel generators first; on the CPU the full weights are then the same at
        every tensor-parallel size. None draws from the generators as they are.
    vp_stage: which virtual stage to build; needed with interleaved pipelines.
    pg_collection: process groups; None is megatron-core's own, by `parallel_state`.
    The other arguments are those of `transformer_config`, which states the errors.
    """
    made = transformer_config(
        config, dtype=dtype, sequence_parallel=sequence_parallel, recompute=recompute, overrides=overrides
    )
    scaling = config.rope_scaling if config.position_embedding == "rope" else None
    if seed is not None:
        seed_everything(seed)
    model = GPTModel(
        config=made,
        transformer_layer_spec=layer_spec or local_layer_spec(config),
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling["factor"] if scaling else 1.0,
        pg_collection=pg_collection,
        **_shared_arguments(config, made, vp_stage),
    )
    return _placed(model, dtype)


def _placed(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """The model on its device, every parameter in `dtype`: WrappedTorchNorm makes fp32 weights whatever it is told.

    Changes `.data`, which keeps the attributes that megatron-core sets on its parameters.
    """
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model.cuda() if torch.cuda.is_available() else model


def _shared_arguments(config: ModelConfig, made: TransformerConfig, vp_stage: int | None) -> dict[str, Any]:
    whole = made.pipeline_model_parallel_size == 1  # also where other models of this process have stages
    virtual = made.virtual_pipeline_model_parallel_size
    if virtual is not None and (vp_stage is None or not 0 <= vp_stage < virtual):
        raise ValueError(f"vp_stage must be 0..{virtual - 1} with vpp={virtual}, got {vp_stage}")
    return {
        "vocab_size": config.vocab_size,
        "max_sequence_length": config.max_position_embeddings,
        "pre_process": whole or parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": whole or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        "share_embeddings_and_output_weights": config.tied_embeddings,
        "position_embedding_type": config.position_embedding,
        "rotary_base": config.rope_base,
        "vp_stage": vp_stage,
    }


def hybrid_stack_spec(layer_spec: ModuleSpec) -> ModuleSpec:
    """A HybridModel stack (megatron-core >= 0.19) with the attention and the MLP of a GPT layer spec as two layers.

    Raises ValueError on a megatron-core without HybridModel.
    """
    try:
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    except ModuleNotFoundError as error:
        raise ValueError(_no_hybrid()) from error
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp

    parts = layer_spec.submodules
    attention = dataclasses.replace(
        parts, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp, sharded_state_dict_keys_map={}
    )
    mlp = dataclasses.replace(
        parts,
        input_layernorm=IdentityOp,
        self_attention=IdentityOp,
        self_attn_bda=IdentityFuncOp,
        sharded_state_dict_keys_map={},
    )
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=layer_spec.module, params=layer_spec.params, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def build_hybrid_model(
    config: ModelConfig,
    stack_spec: ModuleSpec | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
    seed: int | None = None,
    vp_stage: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> torch.nn.Module:
    """The same network as `build_model`, as a megatron-core >= 0.19 HybridModel: attention and MLP layers in turn.

    stack_spec: from `hybrid_stack_spec`; None is the local layer spec. Layer i of `build_model` is here layers
    2i (attention) and 2i + 1 (MLP). Raises ValueError on a megatron-core without HybridModel and for Llama 3 RoPE
    scaling, which HybridModel does not have.
    """
    try:
        from megatron.core.models.hybrid.hybrid_model import HybridModel
    except ModuleNotFoundError as error:
        raise ValueError(_no_hybrid()) from error
    if config.position_embedding == "rope" and config.rope_scaling is not None:
        raise ValueError("HybridModel has no Llama 3 rope_scaling: use build_model (GPTModel) for this model")
    made = transformer_config(
        config,
        dtype=dtype,
        sequence_parallel=sequence_parallel,
        recompute=recompute,
        overrides={"is_hybrid_model": True, "num_layers": 2 * config.num_layers} | dict(overrides or {}),
    )
    if seed is not None:
        seed_everything(seed)
    sizes = current_sizes()
    stages = sizes.pp * (sizes.vpp or 1)
    model = HybridModel(
        config=made,
        hybrid_stack_spec=stack_spec or hybrid_stack_spec(local_layer_spec(config)),
        hybrid_layer_pattern="|".join(["*-" * (config.num_layers // stages)] * stages),
        **_shared_arguments(config, made, vp_stage),
    )
    return _placed(model, dtype)


def _no_hybrid() -> str:
    import megatron.core

    return f"HybridModel needs megatron-core 0.19 or newer, this is {megatron.core.__version__}: use build_model"
