"""Specs as hosts resolve them, specs made from other specs, and every refusal of what prefix groups cannot do."""

from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prefix import RolloutGroup, pack_groups, prefix_gpt_layer_spec, response_log_probs, with_prefix_attention
from megatron_prefix.mcore.core_attention import PrefixCoreAttention
from megatron_prefix.mcore.model import build_hybrid_model, build_model, hybrid_stack_spec, transformer_config
from megatron_prefix.mcore.repeated import repeated_log_probs
from megatron_prefix.mcore.self_attention import PrefixSelfAttention
from megatron_prefix.mcore.support import _RULES, refuse_unsupported
from tests.distributed import run_distributed
from tests.mcore_helpers import start, tiny_config

SPECS = "megatron_prefix.specs"
LOCAL_NAMES = ("local", "local_qk", "local_rmsnorm", "local_rmsnorm_qk")
HAS_HYBRID = find_spec("megatron.core.models.hybrid") is not None
GROUPS = [
    RolloutGroup([1, 2, 3, 4, 5], [[6, 7], [8], [9, 10, 11]], [1.0, 0.0, 0.5]),
    RolloutGroup([7], [[3, 2]], [1.0]),
]


def config_with(**changes: Any) -> TransformerConfig:
    """A plain configuration with values that its own checks might refuse set afterwards."""
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, attention_dropout=0.0, hidden_dropout=0.0
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


# ---- models built from every kind of spec, on one rank


def by_megatron_lm(name: str) -> ModuleSpec:
    """What Megatron-LM does with ``--spec megatron_prefix.specs NAME``."""
    return vars(import_module(SPECS))[name]


def build(spec: Any, norm: str, qk_layernorm: bool, **overrides: Any) -> torch.nn.Module:
    config = tiny_config(norm=norm, qk_layernorm=qk_layernorm)
    return build_model(config, layer_spec=spec, dtype=torch.float64, seed=2, overrides=overrides)


def difference(model: torch.nn.Module, norm: str = "rmsnorm", qk_layernorm: bool = False, **overrides: Any) -> float:
    """Largest difference of log-probs from the plain model on repeated prefixes."""
    (pack,), (repeated,) = pack_groups(GROUPS), pack_groups(GROUPS, repeated=True)
    expected = repeated_log_probs(build(None, norm, qk_layernorm, **overrides), repeated)
    result = response_log_probs(model, pack)
    assert result.shape == expected.shape and result.dtype == torch.float64  # type: ignore[union-attr]
    return (result - expected).abs().max().item()  # type: ignore[operator]


def of_every_spec(rank: int, world_size: int) -> dict[str, float]:
    start()
    found = {}
    for name in LOCAL_NAMES:
        norm, qk_layernorm = ("rmsnorm" if "rms" in name else "layernorm"), "qk" in name
        found[name] = difference(build(by_megatron_lm(name), norm, qk_layernorm), norm, qk_layernorm)
    config = transformer_config(tiny_config(), dtype=torch.float64)
    found["from a config"] = difference(build(prefix_gpt_layer_spec(config), "rmsnorm", False))
    reference = prefix_gpt_layer_spec(config, impl="reference")
    found["impl reference"] = difference(build(reference, "rmsnorm", False))
    block = with_prefix_attention(get_gpt_decoder_block_spec(config, use_transformer_engine=False))
    found["block submodules"] = difference(build(block, "rmsnorm", False))
    scaled = {"softmax_scale": 0.31}
    found["softmax_scale"] = difference(build(prefix_gpt_layer_spec(config), "rmsnorm", False, **scaled), **scaled)
    if HAS_HYBRID:
        stack = with_prefix_attention(hybrid_stack_spec(get_gpt_layer_local_spec(normalization="RMSNorm")))
        (pack,), (repeated,) = pack_groups(GROUPS), pack_groups(GROUPS, repeated=True)
        hybrid = build_hybrid_model(tiny_config(), stack, dtype=torch.float64, seed=2)
        plain = build_hybrid_model(tiny_config(), dtype=torch.float64, seed=2)
        found["hybrid stack"] = (
            (response_log_probs(hybrid, pack) - repeated_log_probs(plain, repeated)).abs().max().item()  # type: ignore[operator]
        )
    return found


def test_models_from_every_spec_equal_plain_megatron_core() -> None:
    (found,) = run_distributed(of_every_spec, 1)
    assert {*LOCAL_NAMES, "from a config", "impl reference", "block submodules", "softmax_scale"} <= found.keys()
    assert ("hybrid stack" in found) is HAS_HYBRID
    assert max(found.values()) <= 1e-12, found


def refusals_of_a_model(rank: int, world_size: int) -> dict[str, str]:
    start()
    config = transformer_config(tiny_config(), dtype=torch.float64)
    model = build(prefix_gpt_layer_spec(config), "rmsnorm", False)
    flash = build(prefix_gpt_layer_spec(config, impl="flash"), "rmsnorm", False)
    (pack,) = pack_groups(GROUPS)
    ids = pack.tokens.unsqueeze(0)
    offsets = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    longest = ids.shape[1]
    plain = PackedSeqParams("thd", offsets, offsets, max_seqlen_q=longest, max_seqlen_kv=longest)
    calls: dict[str, Callable[[], Any]] = {
        "no layout": lambda: model(ids, torch.arange(ids.shape[1]).unsqueeze(0), None),
        "plain packed_seq_params": lambda: model(ids, ids, None, packed_seq_params=plain),
        "flash on the CPU": lambda: response_log_probs(flash, pack),
        "dropout in the model": lambda: build(by_megatron_lm("local_rmsnorm"), "rmsnorm", False, attention_dropout=0.1),
        "no qk norm in the spec": lambda: build(by_megatron_lm("local_rmsnorm"), "rmsnorm", True),
        "no l2 norm in the spec": lambda: build(by_megatron_lm("local_rmsnorm"), "rmsnorm", False, qk_l2_norm=True),
        "window in the model": lambda: build(by_megatron_lm("local_rmsnorm"), "rmsnorm", False, window_size=(8, 0)),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


def test_models_refuse_what_they_cannot_do() -> None:
    (found,) = run_distributed(refusals_of_a_model, 1)
    assert "got packed_seq_params=NoneType, which has no layout; pass packed_seq_params=" in found["no layout"]
    assert "got packed_seq_params=PackedSeqParams, which has no layout" in found["plain packed_seq_params"]
    assert "impl='flash' runs on CUDA" in found["flash on the CPU"]
    # ready-made specs know no configuration, so the layer itself refuses
    assert "attention_dropout=0.1 is not supported with prefix groups" in found["dropout in the model"]
    assert "qk_layernorm=True, but the layer spec has no norm of queries and keys" in found["no qk norm in the spec"]
    assert "qk_l2_norm=True, but the layer spec has no norm of queries and keys" in found["no l2 norm in the spec"]
    assert "window_size=(8, 0) is not supported with prefix groups" in found["window in the model"]


# ---- specs as data


def test_ready_made_specs_are_plain_attributes() -> None:
    names = vars(import_module(SPECS))
    assert all(isinstance(names[name], ModuleSpec) for name in LOCAL_NAMES)
    assert ("te" in names) is ("te_qk" in names) is (find_spec("transformer_engine") is not None)
    documented = [
        line.split()[0] for line in (names["__doc__"] or "").splitlines() if line.startswith(("    local", "    te"))
    ]
    assert documented == ["local", "local_rmsnorm", "local_rmsnorm_qk", "local_qk", "te", "te_qk"]


def test_only_the_attention_of_a_spec_changes_and_the_original_stays() -> None:
    original = get_gpt_layer_local_spec(qk_layernorm=True)
    before = repr(original)
    made = with_prefix_attention(original, impl="sdpa")
    assert repr(original) == before and original.submodules.self_attention.module is SelfAttention
    attention = made.submodules.self_attention
    assert attention.module is PrefixSelfAttention
    assert attention.submodules.core_attention.func is PrefixCoreAttention
    assert attention.submodules.core_attention.keywords == {"impl": "sdpa"}
    attention.module = SelfAttention
    attention.submodules.core_attention = original.submodules.self_attention.submodules.core_attention
    made.submodules.self_attn_bda = original.submodules.self_attn_bda
    assert repr(made) == before


def test_a_layer_without_rows_of_attention_drops_its_residual_and_others_keep_it() -> None:
    build = with_prefix_attention(get_gpt_layer_local_spec()).submodules.self_attn_bda
    add = build(True, False)
    residual = torch.randn(5, 1, 4)
    assert add((residual.new_empty(0, 1, 4), None), residual, 0.0).shape == (0, 1, 4)
    assert torch.equal(add((torch.ones(5, 1, 4), None), residual, 0.0), residual + 1)


def test_a_prefix_spec_may_be_made_again_with_another_impl() -> None:
    made = with_prefix_attention(with_prefix_attention(get_gpt_layer_local_spec()), impl="reference")
    assert made.submodules.self_attention.submodules.core_attention.keywords == {"impl": "reference"}


def test_every_layer_of_a_block_is_replaced() -> None:
    layers = [get_gpt_layer_local_spec(), *[get_gpt_layer_local_spec(qk_layernorm=True)] * 2]
    block = with_prefix_attention(TransformerBlockSubmodules(layer_specs=layers, layer_norm=torch.nn.LayerNorm))
    assert [layer.submodules.self_attention.module for layer in block.layer_specs] == [PrefixSelfAttention] * 3
    assert block.layer_norm is torch.nn.LayerNorm


@pytest.mark.parametrize("setting", ["qk_layernorm", "qk_l2_norm"])
def test_norms_of_queries_and_keys_are_those_of_the_config(setting: str) -> None:
    own = get_gpt_layer_local_spec(**{setting: True}).submodules.self_attention.submodules
    made = prefix_gpt_layer_spec(config_with(**{setting: True})).submodules.self_attention.submodules
    assert (made.q_layernorm, made.k_layernorm) == (own.q_layernorm, own.k_layernorm)
    assert own.q_layernorm is not get_gpt_layer_local_spec().submodules.self_attention.submodules.q_layernorm


class OwnAttention(SelfAttention):
    """A host's own attention."""


def own_attention() -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.module = OwnAttention
    return spec


def no_submodules() -> ModuleSpec:
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention.submodules = None
    return spec


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (own_attention, "OwnAttention changes SelfAttention in its own way; derive it from PrefixSelfAttention"),
        (no_submodules, "SelfAttention without SelfAttentionSubmodules cannot be made prefix-grouped"),
        (lambda: get_gpt_layer_local_spec().submodules.mlp, "holds no SelfAttention to replace"),
        (lambda: get_gpt_layer_local_spec(multi_latent_attention=True), "holds no SelfAttention to replace"),
    ],
)
def test_specs_that_cannot_be_made_are_refused(spec: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_prefix_attention(spec())


def test_an_unknown_impl_is_refused_wherever_it_is_given() -> None:
    for make in (lambda: with_prefix_attention(get_gpt_layer_local_spec(), impl="fast"),
                 lambda: prefix_gpt_layer_spec(config_with(), impl="fast")):  # fmt: skip
        with pytest.raises(ValueError, match="unknown impl 'fast'; choose one of auto, reference"):
            make()


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
def test_te_without_transformer_engine_names_the_remedy() -> None:
    with pytest.raises(
        ImportError, match=r"needs Transformer Engine: pip install 'megatron-prefix\[te\]', or use_te=False"
    ):
        prefix_gpt_layer_spec(config_with(), use_te=True)


# ---- what a configuration may not have

BAD: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0.1,),
    "hidden_dropout": (0.1,),
    "window_size": ((128, 0),),
    "window_attn_skip_freq": (2, [1, 0]),
    "softmax_type": ("learnable", "off-by-one"),
    "attn_logit_softcapping": (30.0,),
    "mrope_section": ([2, 3, 3],),
    "fp8_dot_product_attention": (True,),
    "fp8_multi_head_attention": (True,),
    "multi_latent_attention": (True,),
    "qk_clip": (True,),
    "log_max_attention_logit": (True,),
    "fused_single_qkv_rope": (True,),
    "flash_decode": (True,),
    "context_parallel_size": (2,),
    "mtp_num_layers": (1,),
    "use_mup": (True,),
    "moe_aux_loss_coeff": (0.01, [0.01, 0.0]),
    "moe_z_loss_coeff": (1e-3,),
    "moe_input_jitter_eps": (0.1,),
    "moe_expert_capacity_factor": (1.0,),
    "moe_router_enable_expert_bias": (True,),
}
OTHER_RELEASES = {"attn_logit_softcapping", "use_mup"}
"""Settings that not every megatron-core has as a field of its configuration."""


@pytest.mark.parametrize(("name", "value"), [(rule[0], value) for rule in _RULES for value in BAD[rule[0]]])
def test_each_setting_is_refused_by_name_with_value_reason_and_remedy(name: str, value: Any) -> None:
    ((allowed, why),) = [(rule[1], rule[2]) for rule in _RULES if rule[0] == name]
    config = config_with(**{name: value})
    for refuse in (refuse_unsupported, prefix_gpt_layer_spec):
        with pytest.raises(ValueError) as refused:
            refuse(config)
        assert str(refused.value) == (
            f"{name}={value!r} is not supported with prefix groups: {why}; set {name}={allowed[0]!r}"
        )
    for fine in allowed:
        refuse_unsupported(config_with(**{name: fine}))


def test_every_rule_is_about_a_setting_that_exists() -> None:
    known = {field.name for field in fields(TransformerConfig)}
    assert {rule[0] for rule in _RULES} - known <= OTHER_RELEASES
    assert len({rule[0] for rule in _RULES}) == len(_RULES)


def test_deterministic_mode_needs_the_switch_that_kernels_read() -> None:
    """The switch is on in every test (see `fill_fresh_memory_with_nan`), which turns it on again."""
    config = config_with(deterministic_mode=True)
    refuse_unsupported(config)
    torch.use_deterministic_algorithms(False)
    with pytest.raises(ValueError, match=r"deterministic_mode=True.* call torch.use_deterministic_algorithms\(True\)"):
        refuse_unsupported(config)
    refuse_unsupported(config_with())


def core_attention(config: TransformerConfig | None = None, **changes: Any) -> PrefixCoreAttention:
    arguments = {"layer_number": 1, "attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | changes
    return PrefixCoreAttention(config or config_with(), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_dropout": 0.2}, "attention_dropout=0.2 is not supported with prefix groups; set it to 0"),
        ({"attention_type": "cross"}, "is self attention, got attention_type='cross'"),
        ({"attn_mask_type": AttnMaskType.no_mask}, "is causal, got attn_mask_type=AttnMaskType.no_mask"),
        ({"attn_mask_type": AttnMaskType.padding}, "is causal, got attn_mask_type=AttnMaskType.padding"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
        ({"config": config_with(softmax_type="learnable")}, "softmax_type='learnable' is not supported"),
    ],
)
def test_the_layer_refuses_at_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        core_attention(**changes)
    core_attention(attn_mask_type=AttnMaskType.padding_causal)


def test_the_layer_refuses_inputs_it_cannot_take() -> None:
    from megatron_prefix import PrefixLayout, PrefixPackedSeqParams

    layer = core_attention()
    packed = PrefixPackedSeqParams.build(PrefixLayout([3, 2], [-1, 0]), torch.device("cpu"))
    q, k = torch.randn(5, 1, 2, 8), torch.randn(5, 1, 1, 8)
    out = layer(q, k, k, None, packed_seq_params=packed)
    assert out.shape == (5, 1, 16)
    with pytest.raises(ValueError, match="takes no attention_bias"):
        layer(q, k, k, None, attention_bias=torch.zeros(1, 2, 5, 5), packed_seq_params=packed)
    with pytest.raises(ValueError, match=r"expected query \[T, 1, heads, head_dim\], got \(5, 2, 2, 8\)"):
        layer(q.expand(5, 2, 2, 8), k.expand(5, 2, 1, 8), k.expand(5, 2, 1, 8), None, packed_seq_params=packed)
    with pytest.raises(ValueError, match="q has 4 rows, the layout has 5"):
        layer(q[:4], k[:4], k[:4], None, packed_seq_params=packed)
    for missing in (None, PackedSeqParams(qkv_format="thd")):
        with pytest.raises(ValueError, match=f"got packed_seq_params={type(missing).__name__}, which has no layout"):
            layer(q, k, k, None, packed_seq_params=missing)


def test_padding_neither_attends_nor_is_attended() -> None:
    from megatron_prefix import PrefixLayout, PrefixPackedSeqParams

    packed = PrefixPackedSeqParams.build(PrefixLayout([3, 2], [-1, 0]), torch.device("cpu"), multiple_of=4)
    assert packed.num_padded_rows == 8 and packed.row_positions.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    q, k = torch.randn(8, 1, 2, 8), torch.randn(8, 1, 1, 8)
    q[5:], k[5:] = torch.nan, torch.nan
    out = core_attention()(q, k, k, None, packed_seq_params=packed)
    assert out[:5].isfinite().all() and (out[5:] == 0).all()


def test_the_layer_takes_the_calls_that_hosts_make() -> None:
    """megatron-core builds it by keywords, with process groups and a comm type, and no dropout given."""
    layer = PrefixCoreAttention(
        config=config_with(),
        layer_number=3,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type="p2p",
        softmax_scale=None,
        pg_collection=ProcessGroupCollection(),
    )
    assert layer.layer_number == 3 and not list(layer.parameters())


def _plain_model_is_refused(rank: int, world_size: int) -> str:
    start()
    (pack,) = pack_groups(GROUPS)
    with pytest.raises(ValueError, match="does not know the layout") as error:
        response_log_probs(build(None, "rmsnorm", False), pack)
    return str(error.value)


def test_log_probs_of_a_model_without_prefix_attention_are_refused() -> None:
    (message,) = run_distributed(_plain_model_is_refused, 1)
    assert "self_attention (SelfAttention)" in message and "prefix_gpt_layer_spec" in message
