"""`megatron-prefix plan-cp`: tables, JSON and picture say what the plan says, and bad input is refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from megatron_prefix import PrefixLayout, RolloutGroup, write_rollouts
from megatron_prefix.cli.main import main
from megatron_prefix.cli.plan_picture import MOST_PIXELS, NOT_SEEN, owners_of_pairs
from megatron_prefix.context_parallel.choice import CpLayers, predicted_cost
from megatron_prefix.context_parallel.placement import PLACEMENTS
from megatron_prefix.context_parallel.plan import CpPlan
from megatron_prefix.context_parallel.traffic import AttentionShape, plan_with_traffic, untrimmed_traffic

pytestmark = pytest.mark.ci_oldest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--prefix-len", "40", "--response-len", "9", "--group-size", "5", "--cp", "4"]
TINY_LAYOUT = PrefixLayout([40, 9, 9, 9, 9, 9], [-1, 0, 0, 0, 0, 0])
HEADS = ["--heads", "8", "--kv-heads", "2", "--head-dim", "16"]
SHAPE = AttentionShape(8, 2, 16)


def plan_cp(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(main, ["plan-cp", *arguments])


def report(*arguments: str) -> dict[str, Any]:
    result = plan_cp(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("way", [["p2p"], ["a2a"], ["a2a+p2p", "--cp-a2a", "2"]], ids=lambda way: way[0])
def test_json_is_the_plan(placement: str, way: list[str]) -> None:
    data = report(*TINY, *HEADS, "--cp-placement", placement, "--cp-comm-type", *way)
    plan = CpPlan.build(TINY_LAYOUT, 4, placement)
    a2a = int(way[2]) if len(way) > 1 else None
    (pack,) = data["packs"]
    costs = pack.pop("costs")
    assert pack == plan_with_traffic(plan, SHAPE, way[0], a2a)
    layers = CpLayers(SHAPE, (way[0],), a2a)
    assert costs == {name: predicted_cost(CpPlan.build(TINY_LAYOUT, 4, name), layers) for name in PLACEMENTS}
    assert (data["command"], data["comm_type"], data["cp_a2a"]) == ("plan-cp", way[0], a2a)


def test_every_way_is_listed_beside_repeated_prefixes_and_every_key() -> None:
    ways = report(*TINY, *HEADS)["ways"]
    listed = [(way["comm_type"], way["cp_a2a"], way["placement"]) for way in ways]
    names = ("repeated", "every key", *PLACEMENTS)
    kinds = [("p2p", None), ("all_gather", None), ("a2a", None), ("a2a+p2p", 2)]
    assert listed == [(*kind, name) for kind in kinds for name in names]
    found = {(way["comm_type"], way["placement"]): way for way in ways}
    for way in ways:
        how = way["comm_type"], way["cp_a2a"]
        if way["placement"] in ("repeated", "every key"):
            layout = TINY_LAYOUT.repeated() if way["placement"] == "repeated" else TINY_LAYOUT
            moved = untrimmed_traffic(layout, 4, SHAPE, *how)
            parts = [(moved.forward.received, moved.backward.received)] * 4
        else:
            ranks = plan_with_traffic(CpPlan.build(TINY_LAYOUT, 4, way["placement"]), SHAPE, *how)["ranks"]
            parts = [(rank["bytes"]["forward"]["received"], rank["bytes"]["backward"]["received"]) for rank in ranks]
        assert way["forward"] == max(forward for forward, _ in parts)
        assert way["forward_backward"] == max(map(sum, parts))
        assert way["forward_all_ranks"] == sum(forward for forward, _ in parts)
        assert way["forward_backward_all_ranks"] == sum(map(sum, parts))
        for key, name in (("less_than_repeated", "repeated"), ("less_than_every_key", "every key")):
            assert way[key] == found[way["comm_type"], name]["forward_backward"] / way["forward_backward"]


def test_heads_that_do_not_divide_are_said_and_the_rest_is_shown() -> None:
    result = plan_cp(*TINY[:-2], "--cp", "3", *HEADS, "--json")
    assert result.exit_code == 0
    ways = json.loads(result.stdout.splitlines()[-1])["ways"]
    assert [way.get("refused") for way in ways if way["comm_type"] == "a2a"] == [
        "cp_comm_type a2a needs query heads that divide by its 3 ranks, got 8; use p2p"
    ]
    assert len([way for way in ways if "refused" not in way]) == 8
    refused = plan_cp(*TINY[:-2], "--cp", "3", *HEADS, "--cp-comm-type", "a2a")
    assert refused.exit_code == 2 and "query heads that divide by its 3 ranks, got 8" in refused.stderr


def test_tables() -> None:
    result = plan_cp("--cp", "8")
    assert result.exit_code == 0 and not result.stdout
    text = result.stderr
    assert "…" not in text  # fits a terminal of 80 columns
    assert "pack 1 of 1: 32,768 rows over 8 ranks, p2p, branch" in text
    ranks = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│ ")]
    assert ranks[0] == ["0", "4,096", "2,048", "14,336", "51.4", "1.000", "56.0", "112.0"]
    assert [row[0] for row in ranks[:8]] == [str(rank) for rank in range(8)]
    assert ["p2p", "repeated", "952.0", "2,856.0", "", ""] in ranks
    assert ["p2p", "every key", "112.0", "336.0", "", ""] in ranks
    assert ["p2p", "branch", "56.0", "168.0", "17.00x", "2.00x"] in ranks
    said = " ".join(text.split())
    layout, layers = PrefixLayout([16384] + [1024] * 16, [-1] + [0] * 16), CpLayers(AttentionShape(32, 8, 128))
    costs = {name: predicted_cost(CpPlan.build(layout, 8, name), layers) for name in PLACEMENTS}
    assert "auto: branch, by predicted cost of the slowest rank with p2p, in TFLOP" in said
    assert all(f"{name} {cost / 1e12:,.3f}" in said for name, cost in costs.items())
    assert "p2p, branch: 2.00x fewer bytes forward and 2.00x in all than every key" in said
    assert "2.00x and 1.83x at the busiest rank, 1.75x and 1.75x over all ranks" in said


def test_auto_goes_by_the_comm_type() -> None:
    uneven = [flag for n in (3000, 200, 200, 200) for flag in ("--response-len", str(n))]
    for comm_type, chosen in (("p2p", "branch"), ("a2a", "dual_chunk_swap")):
        found = report("--prefix-len", "4096", *uneven, "--cp", "4", "--cp-comm-type", comm_type)["packs"][0]
        assert found["placement"] == chosen == min(found["costs"], key=found["costs"].get)


def test_one_rank_sends_nothing() -> None:
    result = plan_cp("--prefix-len", "4", "--response-len", "3", "--cp", "1")
    assert result.exit_code == 0 and "p2p: branch sends nothing" in result.stderr


def test_auto_is_not_mentioned_where_a_placement_was_given() -> None:
    assert "auto:" not in plan_cp(*TINY, "--cp-placement", "branch").stderr


def test_unequal_responses() -> None:
    data = report("--prefix-len", "7", "--response-len", "5", "--response-len", "2", "--cp", "1")
    assert data["packs"][0]["lengths"] == [7, 5, 2]
    assert data["packs"][0]["ranks"][0]["bytes"]["forward"] == {"sent": 0, "received": 0}


def test_packs_of_a_rollouts_file(tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    write_rollouts(file, [RolloutGroup([1] * n, [[2] * 4, [3] * 2], [0.0, 1.0]) for n in (9, 3, 5)])
    whole = report("--rollouts", str(file))
    assert [pack["lengths"] for pack in whole["packs"]] == [[8, 4, 2, 2, 4, 2, 4, 4, 2]]
    cut = report("--rollouts", str(file), "--max-tokens-per-microbatch", "20")
    assert [pack["lengths"] for pack in cut["packs"]] == [[8, 4, 2], [2, 4, 2, 4, 4, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--response-len", "3", "--response-len", "4", "--group-size", "3"], "2 times --response-len"),
        (["--cp-comm-type", "a2a+p2p"], "--cp-a2a is the inner size"),
        (["--cp-a2a", "2"], "--cp-a2a is the inner size"),
        (["--cp", "4", "--cp-comm-type", "a2a+p2p", "--cp-a2a", "3"], "a2a size that divides cp=4, got 3"),
        (["--heads", "6", "--kv-heads", "4"], "kv_heads must divide query_heads=6, got 4"),
        (["--max-tokens-per-microbatch", "100"], "give --rollouts, or leave it out"),
        (["--picture", "no/such/folder/plan.png"], "the folder no/such/folder does not exist"),
        (["--rollouts", str(ROOT / "setup.py")], "setup.py:1:"),
        (["--rollouts", str(ROOT / "setup.py"), "--response-len", "3"], "leave out --response-len"),
        (["--cp", "0"], "0 is not in the range x>=1"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    result = plan_cp(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("placement", ["auto", "branch"])
def test_picture(placement: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.png"
    result = plan_cp(*TINY, "--cp-placement", placement, "--picture", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes().startswith(b"\x89PNG") and "plan.png" in "".join(result.stderr.split())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_picture_shows_who_computes_what(placement: str) -> None:
    """Against the mask, pair by pair; a long pack is sampled."""
    layout = PrefixLayout([3, 2, 4, 1, 2, 0, 3, 5], [-1, 0, 1, 2, 3, 2, 5, 0])
    plan = CpPlan.build(layout, 3, placement)
    owner = {row: rank for rank in range(3) for row in plan.rows(rank)}
    segment_of = [s for s, length in enumerate(layout.lengths) for _ in range(length)]
    everything = owners_of_pairs(plan, np.arange(layout.num_rows))
    for query in range(layout.num_rows):
        for key in range(layout.num_rows):
            seen = key <= query and segment_of[key] in layout.branch(segment_of[query])
            assert everything[query, key] == (owner[query] if seen else NOT_SEEN)
    some = np.array([0, 3, 4, 11, 19])
    assert (owners_of_pairs(plan, some) == everything[np.ix_(some, some)]).all()
    assert MOST_PIXELS < 32768  # the default layout is one that is sampled


def test_neither_megatron_core_nor_process_groups_are_needed() -> None:
    script = (
        "import sys; from megatron_prefix.cli.main import main\n"
        "try: main(['plan-cp', '--cp', '2', '--json'])\n"
        "except SystemExit as e: assert e.code in (0, None), e.code\n"
        "import torch.distributed as dist; assert not dist.is_initialized()\n"
        "assert not [name for name in sys.modules if name.startswith('megatron.')]"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=180
    )
