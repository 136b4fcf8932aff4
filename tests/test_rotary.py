"""Rotary frequencies: picked once per micro-batch, and Transformer Engine's fused rotary embedding with them.

Transformer Engine's own Python code runs over a stand-in for its two compiled functions alone.
"""

import gc
import importlib.util
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import transformer_config as megatron_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prefix import PrefixLayout, pack_groups, prefix_gpt_layer_spec, response_log_probs
from megatron_prefix.mcore.model import build_model, transformer_config
from megatron_prefix.mcore.packed import PrefixPackedSeqParams
from tests import equivalence_cases as ec
from tests.attention_oracle import DEEP
from tests.distributed import run_distributed
from tests.downloads import downloaded
from tests.mcore_helpers import tiny_config

CPU = torch.device("cpu")
VERSIONS = ("2.8.0", "2.10.0", "2.12.0", "2.15.0", "2.18.0", "2.20.2")


def table_of(positions: int, width: int = 8, base: float = 10000.0, interleaved: bool = False) -> Tensor:
    """Frequencies [positions, 1, 1, width], as megatron-core makes them."""
    angles = torch.outer(torch.arange(positions).float(), base ** (-torch.arange(0, width, 2) / width))
    pairs = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat((angles, angles), dim=1)
    return pairs[:, None, None]


# ---- once per micro-batch


def test_rows_are_those_of_their_positions() -> None:
    packed = PrefixPackedSeqParams.build(DEEP, CPU, multiple_of=8)
    table = table_of(DEEP.max_sequence_length)
    rows = packed.rotary_rows(table)
    assert torch.equal(rows[: DEEP.num_rows], table[list(DEEP.positions)])
    assert torch.equal(rows[DEEP.num_rows :], table[:1].expand(packed.num_padded_rows - DEEP.num_rows, 1, 1, 8))
    assert rows.is_contiguous()  # Transformer Engine reads them by address
    wide = table_of(DEEP.max_sequence_length, 16)[..., ::2]
    assert not wide.is_contiguous() and packed.rotary_rows(wide).is_contiguous()


def test_a_table_is_picked_from_once() -> None:
    packed, table = PrefixPackedSeqParams.build(DEEP, CPU), table_of(64)
    rows = packed.rotary_rows(table)
    assert packed.rotary_rows(table) is packed.as_sbhd().rotary_rows(table) is rows
    assert packed.rotary_rows(table.detach()) is rows  # what recomputed layers get


def test_tables_and_micro_batches_are_never_mixed() -> None:
    """Tables that are equal in shape, of two models or of one memory, and packs with one table."""
    packed = PrefixPackedSeqParams.build(DEEP, CPU)
    other = PrefixPackedSeqParams.build(PrefixLayout([3, 2], [-1, 0]), CPU)
    together = torch.stack([table_of(64), table_of(64, base=100.0)])
    for table in (*together, together[0], table_of(64, base=7.0), together[1, 1:], together[1, :63]):
        for micro_batch in (packed, other, packed):
            assert torch.equal(micro_batch.rotary_rows(table), table[micro_batch.row_positions])


def test_a_table_cannot_take_the_place_of_one_that_is_gone() -> None:
    """New tensors get the memory of freed ones: the table must live as long as what was picked from it."""
    packed = PrefixPackedSeqParams.build(DEEP, CPU)
    for base in range(2, 40):
        table = table_of(4096, base=float(base))
        assert torch.equal(packed.rotary_rows(table), table[packed.row_positions])
        del table


def test_rows_are_freed_with_their_micro_batch() -> None:
    packed, table = PrefixPackedSeqParams.build(DEEP, CPU), table_of(64)
    rows = weakref.ref(packed.rotary_rows(table))
    assert rows() is not None
    del packed
    gc.collect()
    assert rows() is None


class Gathers(TorchDispatchMode):
    """Counts tables of frequencies from which rows are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        picks = func in (torch.ops.aten.index_select.default, torch.ops.aten.index.Tensor)
        self.count += picks and args[0].shape[1:3] == (1, 1) and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def count_gathers(rank: int, world_size: int) -> dict[str, int]:
    def run(recompute: str) -> int:
        config = tiny_config(num_layers=4)
        spec = prefix_gpt_layer_spec(transformer_config(config))
        model = build_model(config, layer_spec=spec, recompute=recompute)
        with Gathers() as gathers:
            for pack in pack_groups(ec.ragged_batch(), max_tokens_per_pack=ec.MAX_TOKENS)[:2]:
                log_probs = response_log_probs(model, pack)
                assert isinstance(log_probs, Tensor)
                log_probs.sum().backward()
        return gathers.count

    return {recompute: ec.in_groups(1, 1, run, recompute) for recompute in ("none", "selective", "full")}


def test_four_layers_pick_once_per_micro_batch() -> None:
    (found,) = run_distributed(count_gathers, 1)
    assert found == {"none": 2, "selective": 2, "full": 2}  # two packs


# ---- Transformer Engine's fused rotary embedding


def turned(t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """t [rows, ..., d] turned by angles [rows, ..., at most d], in fp32 at least; the other channels stay."""
    width = angles.shape[-1]
    wide, rest = t[..., :width].to(torch.promote_types(t.dtype, torch.float32)), t[..., width:]
    if interleaved:
        half = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        half = torch.cat((-wide[..., width // 2 :], wide[..., : width // 2]), dim=-1)
    return torch.cat(((wide * angles.cos() + half * angles.sin()).to(t.dtype), rest), dim=-1)


def kernel(
    t: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: str,
    interleaved: bool,
    cu_seqlens: Tensor | None,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """What the compiled function is documented to compute and to refuse, on one rank: "sbhd" turns row i by freqs[i],
    "thd" begins again at every sequence, with freqs[start_positions]."""
    assert freqs.dim() == 4 and freqs.shape[1:3] == (1, 1) and freqs.shape[3] <= t.shape[-1]
    assert freqs.dtype is torch.float32 and freqs.is_contiguous() and (cp_size, cp_rank) == (1, 0)
    if qkv_format == "sbhd":
        assert t.dim() == 4 and len(t) <= len(freqs) and start_positions is None
        return turned(t, freqs[: len(t)], interleaved)
    assert qkv_format == "thd" and t.dim() == 3 and cu_seqlens is not None
    lengths = cu_seqlens.diff().tolist()
    starts = [0] * len(lengths) if start_positions is None else start_positions.tolist()
    angles = torch.cat([freqs[start : start + length] for start, length in zip(starts, lengths, strict=True)])
    return turned(t, angles[:, 0], interleaved)


def kernel_backward(dout: Tensor, freqs: Tensor, *args: Any) -> Tensor:
    """Turns back. Before 2.10 it takes no start_positions."""
    start_positions = args[0] if len(args) == 6 else None
    return kernel(dout, -freqs, start_positions, *args[-5:])


def load_rope(source: Path) -> Any:
    """Transformer Engine's rope.py over the stand-in."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions")
    stand_ins: dict[str, Any] = {name: ModuleType(name) for name in names}
    stand_ins["transformer_engine_torch"] = SimpleNamespace(
        fused_rope_forward=kernel, fused_rope_backward=kernel_backward
    )
    formats = {name: name for name in ("sbhd", "thd")}
    stand_ins["transformer_engine.pytorch.cpp_extensions.fused_attn"] = SimpleNamespace(QKVFormat=formats)
    spec = importlib.util.spec_from_file_location("rope_of_transformer_engine", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


def rope_source(version: str) -> Path:
    folder = downloaded(f"transformer-engine=={version}")
    return folder / "transformer_engine" / "pytorch" / "attention" / "rope.py"


@pytest.fixture(params=VERSIONS)
def rope(request: pytest.FixtureRequest) -> Any:
    return load_rope(rope_source(request.param))


def out_and_gradient(function: Callable[[Tensor], Tensor], t: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    leaf = t.detach().requires_grad_()
    out = function(leaf)
    out.backward(dout)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [16, 8], ids=["all channels", "half of the channels"])
def test_fused_rows_turn_by_their_own_positions(rope: Any, width: int, interleaved: bool) -> None:
    """Padded rows, and a context-parallel rank's, against every row turned by hand, forward and backward."""
    packed = PrefixPackedSeqParams.build(DEEP, CPU, multiple_of=8)
    table, rows = table_of(DEEP.max_sequence_length, width, interleaved=interleaved), packed.num_padded_rows
    torch.manual_seed(0)
    qkv, dout = torch.randn(rows, 1, 3, 32, dtype=torch.float64), torch.randn(rows, 1, 3, 16, dtype=torch.float64)
    query = qkv[..., 16:]  # not contiguous, as megatron-core splits it
    fused = partial(rope.apply_rotary_pos_emb, tensor_format="sbhd", interleaved=interleaved, fused=True)
    expected = out_and_gradient(
        lambda t: torch.cat([turned(t[i : i + 1], table[p : p + 1], interleaved)
                             for i, p in enumerate(packed.row_positions.tolist())]),
        query, dout,
    )  # fmt: skip
    found = out_and_gradient(lambda t: fused(t, packed.rotary_rows(table)), query, dout)
    unfused = out_and_gradient(
        lambda t: rope.apply_rotary_pos_emb(t, packed.rotary_rows(table), "sbhd", interleaved=interleaved), query, dout
    )
    for mine, theirs, right in zip(found, unfused, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=0)
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)  # whose angles are rounded to fp32 elsewhere
    owned = torch.tensor([0, 1, 5, 6, 18, 19])
    packed.row_positions = packed.row_positions[owned]
    mine = fused(query[owned], packed.rotary_rows(table.clone()))
    torch.testing.assert_close(mine, expected[0][owned], atol=1e-12, rtol=0)


def test_start_positions_are_forgotten_in_backward_before_2_10() -> None:
    """Why they are not used: the same rows as packed sequences, each with a start."""
    packed, table = PrefixPackedSeqParams.build(DEEP, CPU), table_of(DEEP.max_sequence_length)
    lengths = torch.tensor([n for n in DEEP.lengths if n])
    starts = torch.tensor([first for first, n in zip(DEEP.first_positions, DEEP.lengths, strict=True) if n])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    torch.manual_seed(0)
    query, dout = torch.randn(2, DEEP.num_rows, 2, 8, dtype=torch.float64)
    for version, right in (("2.8.0", False), ("2.10.0", True), ("2.20.2", True)):
        apply = load_rope(rope_source(version)).apply_rotary_pos_emb
        by_start = partial(apply, freqs=table, tensor_format="thd", start_positions=starts, cu_seqlens=cu_seqlens)
        rows = partial(apply, freqs=packed.rotary_rows(table), fused=True)
        expected = out_and_gradient(lambda t, rows=rows: rows(t[:, None])[:, 0], query, dout)  # type: ignore[misc]
        found = out_and_gradient(partial(by_start, fused=True), query, dout)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) is right


def fused_models(rank: int, world_size: int, sources: list[Path]) -> dict[str, list[float]]:
    """Largest differences of log-probs and of gradients between a model with the fused embedding and without."""
    found = {}
    for source in sources:
        # What megatron-core's extensions/transformer_engine.py defines where Transformer Engine is installed.
        fused = mock.Mock(side_effect=partial(load_rope(source).apply_rotary_pos_emb, tensor_format="sbhd", fused=True))
        with (
            mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb", fused),
            mock.patch.object(megatron_config, "is_te_min_version", lambda *_: True),
        ):
            for position, rotary in (("rope", {}), ("rope", {"rotary_interleaved": True}), ("yarn", {})):
                fused.reset_mock()
                differences = ec.in_groups(1, 1, compare_fused, position, rotary)
                found[f"{source}, {position}, {rotary}"] = [*differences, fused.call_count]
    return found


def compare_fused(position: str, rotary: dict[str, Any]) -> list[float]:
    config = tiny_config(head_dim=12, **ec.POSITIONS[position])
    (pack,) = pack_groups(ec.ragged_batch(trees=True))
    results = []
    for fusion in (True, False):
        settings: dict[str, Any] = {"dtype": torch.float64, "overrides": {"apply_rope_fusion": fusion, **rotary}}
        spec = prefix_gpt_layer_spec(transformer_config(config, **settings))
        model = build_model(config, layer_spec=spec, seed=1, recompute="full", **settings)
        log_probs = response_log_probs(model, pack)
        assert isinstance(log_probs, Tensor)
        (log_probs * torch.linspace(-1, 2, len(log_probs))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((log_probs.detach(), gradients))
    (mine, own), (theirs, plain) = results
    assert own.keys() == plain.keys()
    return [(mine - theirs).abs().max().item(), max((own[n] - plain[n]).abs().max().item() for n in plain)]


def test_models_with_the_fused_embedding() -> None:
    """Through megatron-core's own choice of an embedding; yarn's mscale is not fused, and warned of, by it."""
    (found,) = run_distributed(fused_models, 1, [rope_source(version) for version in ("2.8.0", "2.20.2")])
    for name, (log_probs, gradients, launches) in found.items():
        assert log_probs <= 1e-6 and gradients <= 1e-5, name  # cosines are fp32 in one and fp64 in the other
        assert launches == (0 if "yarn" in name else 2 * 2 * 2), name  # queries and keys, layers, and once more
