"""Token ids only where they are read: packs of lengths, what each rank keeps, and what tensor-parallel rank 0 gives."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from torch.distributed import TCPStore

from megatron_prefix import LossConfig, Pack, RolloutGroup, RolloutTree, TokenCount, TreeNode, pack_groups
from megatron_prefix.cli import stored_data
from megatron_prefix.mcore.log_probs import response_log_probs
from megatron_prefix.mcore.tokens import groups_on_this_rank
from megatron_prefix.mcore.training import PolicyTrainer
from megatron_prefix.packing import repeated_packs
from megatron_prefix.rollouts import check_vocabulary
from megatron_prefix.splitting import pack_and_split, pair_order
from tests import pipeline_cases as pc
from tests.cli_runs import invoke_all, write_groups, write_model
from tests.distributed import run_distributed
from tests.mcore_helpers import start
from tests.pipeline_cases import Case
from tests.strategies import batches

# Of both halves of a vocabulary of 64.
GROUP = RolloutGroup([3, 34, 5], [[6, 57], [38]], [0.0, 1.0], "g", [[-1.0, -2.0], [-3.0]], [[1, 0], [1]])


def the_same_but_for_ids(pack: Pack, other: Pack) -> bool:
    pairs, theirs = pack.pairs, other.pairs
    fields = ("positions", "response_rows", "advantages", "rewards")
    return (
        pack.ids is None
        and other.ids is not None
        and (pack.layout, pack.layout.checksum) == (other.layout, other.layout.checksum)
        and (pack.is_prefix, pack.totals, pairs.num_rollouts) == (other.is_prefix, other.totals, theirs.num_rollouts)
        and all(
            a.equal(b)
            for a, b in (
                *((getattr(pack, k), getattr(other, k)) for k in fields),
                *((getattr(pairs, k), getattr(theirs, k)) for k in ("row", "rollout", "lengths")),
                *([(pack.sampler_log_probs, other.sampler_log_probs)] if other.sampler_log_probs is not None else []),
            )
        )
    )  # fmt: skip


@given(batches())
@settings(max_examples=40, deadline=None)
def test_packs_of_lengths_are_the_same_but_for_ids(groups: list[RolloutGroup | RolloutTree]) -> None:
    short = [group.lengths_only(keep_log_probs=True) for group in groups]
    limit = max(max(len(tokens) for tokens in all_tokens(group)) for group in groups) * 4
    for pack_all in (
        pack_groups,
        repeated_packs,
        lambda each: pack_groups(each, repeated=True),
        lambda each: pack_and_split(each, max_tokens_per_pack=limit),
    ):
        for mine, theirs in zip(pack_all(short), pack_all(groups), strict=True):
            assert the_same_but_for_ids(mine, theirs)
    assert pair_order(short, max_tokens_per_pack=limit).equal(pair_order(groups, max_tokens_per_pack=limit))
    for pack in pack_groups([group.lengths_only() for group in groups]):
        assert pack.sampler_log_probs is None


def all_tokens(group: RolloutGroup | RolloutTree) -> list:
    if isinstance(group, RolloutTree):
        return [node.tokens for node in group.nodes]
    return [group.prompt, *group.responses]


def test_what_is_not_known_cannot_be_read() -> None:
    short = GROUP.lengths_only()
    assert short.prompt == TokenCount(3) and short.log_probs is None and short.loss_masks == GROUP.loss_masks
    assert short.lengths_only(keep_log_probs=True) == short and short.trained_lengths == (1, 1)
    assert RolloutGroup(TokenCount(3), [TokenCount(2), TokenCount(1)], [0, 1], "g", None, [[1, 0], [1]]) == short
    with pytest.raises(ValueError, match=r"only the number of these tokens is known here \(3\)"):
        list(short.prompt)
    with pytest.raises(ValueError, match="only the number of these tokens is known"):
        check_vocabulary([short], 100)
    (pack,) = pack_groups([short])
    for name in ("tokens", "targets"):
        with pytest.raises(ValueError, match="this pack of 5 rows was made from lengths only and has no token ids"):
            getattr(pack, name)


def test_all_tokens_are_known_or_none() -> None:
    with pytest.raises(ValueError, match="group: of 1 of 3 sequences only the number of tokens is known"):
        RolloutGroup([1], [TokenCount(2), [3]], [0.0, 1.0])
    with pytest.raises(ValueError, match="rollout tree: of 1 of 2 sequences only the number"):
        RolloutTree((TreeNode([1, 2], -1), TreeNode(TokenCount(2), 0, (0,))), (1.0,))
    with pytest.raises(ValueError, match=r"of 5 of 10 rows of a pack no token id is known"):
        pack_groups([GROUP, GROUP.lengths_only(keep_log_probs=True)])
    with pytest.raises(ValueError, match="prompt is empty"):
        RolloutGroup(TokenCount(0), [TokenCount(1)], [0.0])


# ---- on ranks


def kept_by_train(rank: int, world_size: int, invocations: list[tuple[list[str], int]]) -> list[list[bool]]:
    """Of every run of `train`, which groups this rank keeps without token ids."""
    kept: list[list[bool]] = []

    class Spy(stored_data.StoredRollouts):
        def __init__(self, trainer: Any, sampler: Any, **settings: Any) -> None:
            kept.append([isinstance(group.prompt, TokenCount) for group in sampler.groups])
            super().__init__(trainer, sampler, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_data, "StoredRollouts", Spy)
        for run in invoke_all(rank, world_size, invocations):
            assert run.exit_code == 0, run.crash + run.stderr
    return kept


def test_train_keeps_tokens_where_they_are_read(tmp_path: Path) -> None:
    """A comparison afterwards reads them everywhere."""
    files = ["--model", f"{write_model(tmp_path)}", "--rollouts", f"{write_groups(tmp_path, 2)}"]
    words = ["train", *files, "--steps", "1", "--tp", "2"]
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    runs = [(each, store.port) for each, store in zip((words, [*words, "--compare", "1"]), stores, strict=True)]
    assert run_distributed(kept_by_train, 2, runs) == [[[False] * 2] * 2, [[True] * 2, [False] * 2]]


def refusals(rank: int, world_size: int) -> list[str]:
    """What each of two tensor-parallel ranks says of one pack, of which rank 1 has lengths only."""
    start(tp=2)
    (model,) = pc.build(Case(layers=2, tp=2))
    short = GROUP.lengths_only()
    found = []
    for group in (short, replace(GROUP, prompt=(3, 64, 5))):
        (pack,) = pack_groups([group if rank == 0 else short])
        with pytest.raises(ValueError) as error:
            response_log_probs(model, pack)
        found.append(str(error.value))
    return found


def test_both_tensor_parallel_ranks_refuse_what_only_one_can_see() -> None:
    ranks = run_distributed(refusals, 2)
    for nothing, outside in ranks:
        assert "the tokens and targets of a pack of 5 rows are read on this stage, and tensor-parallel" in nothing
        assert "row 1: token id 64 is outside the model's vocabulary of 64" in outside


def context_parallel_ranks_disagree(rank: int, world_size: int) -> str:
    start(tp=2, cp=2)
    (model,) = pc.build(Case(layers=2, tp=2, cp=2))
    cp_rank, tp_rank = divmod(rank, 2)
    group = GROUP if cp_rank == 0 else replace(GROUP, prompt=(3, 9, 5))
    (pack,) = pack_groups([group if tp_rank == 0 else group.lengths_only()])
    with pytest.raises(ValueError) as error:
        response_log_probs(model, pack)
    return str(error.value)


def test_context_parallel_ranks_compare_tokens_that_they_were_given() -> None:
    """Those with lengths only do too: both tensor-parallel ranks see the same checksums."""
    messages = run_distributed(context_parallel_ranks_disagree, 4)
    assert len(set(messages)) == 1
    assert "context-parallel ranks have different layouts, placements or tokens" in messages[0]


def with_and_without(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """Whether log-probs of the sampler and tokens are here, and gradients and old log-probs are bitwise the same."""
    start(pp=2, tp=2)
    chunks = pc.build(Case(pp=2, tp=2))
    loss = LossConfig(importance_cap=1.5, kl_coef=0.1, entropy_coef=0.01)
    trainer = PolicyTrainer(chunks, pc.settings_of(Case()), loss)
    groups = [replace(GROUP, prompt=(i, *range(22, 42)), group_id=f"{i}") for i in range(3)]
    found, packs = [], []
    for mine in (groups, groups_on_this_rank(groups, trainer.model)):
        packs = pack_and_split(mine, max_tokens_per_pack=21)
        old = trainer.log_probs_of(packs)
        inputs = [replace(x, ref_log_probs=x.old_log_probs * 1.1) for x in pc.inputs_of(packs, packs_with_ids(groups))]
        trainer.gradients(inputs)
        found.append([*old, *(gradient.clone() for gradient in trainer.named_gradients().values())])
    equal = all(a.equal(b) for a, b in zip(*found, strict=True))
    part = next(pack for pack in packs if not pack.is_prefix)
    return part.sampler_log_probs is not None, part.ids is not None, equal


def packs_with_ids(groups: list[RolloutGroup]) -> list[Pack]:
    return pack_and_split(groups, max_tokens_per_pack=21)


def test_every_term_of_the_loss_is_the_same_without_the_tokens() -> None:
    # stage 0: tokens and nothing; stage 1: all, and what the loss needs
    assert run_distributed(with_and_without, 4) == [
        (True, True, True), (False, False, True), (True, True, True), (True, False, True)
    ]  # fmt: skip
