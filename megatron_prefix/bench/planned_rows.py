"""Rows of a step on one prefix group, counted from the plan of its micro-batches; nothing runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prefix.bench.group import GroupSizes
from megatron_prefix.rollout_tree import RolloutTree
from megatron_prefix.rollouts import RolloutGroup
from megatron_prefix.splitting import pack_and_split, plan_splits

LABELS = {
    "repeated": "repeated prefixes, one sequence each",
    "re_encoded": "parts that encode the prefix again",
    "split": "prefix once, responses in parts",
}


def planned_rows(group: GroupSizes, parts: int) -> dict[str, Any]:
    """Rows and attention area of a group that is to be split, as JSON values.

    A micro-batch may have the rows of the prefix and of its share of the responses, which is what ``parts``
    micro-batches need that encode the prefix again.

    Raises:
        ValueError: fewer than two parts, or more than there are responses.
    """
    if not 2 <= parts <= group.group_size:
        raise ValueError(f"parts must be from 2 to the number of responses, {group.group_size}, got {parts}")
    limit = group.prefix_len + -(-group.group_size // parts) * group.response_len
    rollouts = _rollouts(group, group.group_size)
    (plan,) = plan_splits([rollouts], max_tokens_per_pack=limit, num_parts=parts)
    assert plan is not None
    packs = pack_and_split([rollouts], max_tokens_per_pack=limit, num_parts=parts)
    whole = RolloutTree.from_group(rollouts).layout
    layouts = {
        "repeated": [RolloutTree.from_group(_rollouts(group, 1)).layout] * group.group_size,
        "re_encoded": [RolloutTree.from_group(_rollouts(group, len(part))).layout for part in plan.parts],
        "split": [pack.layout for pack in packs],
    }
    results = {name: _counts([(layout.num_rows, layout.area) for layout in each]) for name, each in layouts.items()}
    for result in results.values():
        result["fewer_rows"] = results["repeated"]["rows"] / result["rows"]
        result["smaller_area"] = results["repeated"]["area"] / result["area"]
    assert results["split"]["rows"] == whole.num_rows and results["split"]["area"] == whole.area
    return {
        "bench": "planned rows",
        "prefix_len": group.prefix_len,
        "response_len": group.response_len,
        "group_size": group.group_size,
        "parts": len(plan.parts),
        "max_tokens_per_microbatch": limit,
        "results": results,
    }


def _rollouts(group: GroupSizes, responses: int) -> RolloutGroup:
    """Responses to the prompt of the group; which tokens they have does not matter."""
    return RolloutGroup([0] * (group.prefix_len + 1), [[0] * group.response_len] * responses, [0.0] * responses)


def _counts(micro_batches: Sequence[tuple[int, int]]) -> dict[str, Any]:
    rows = [rows for rows, _ in micro_batches]
    area = sum(area for _, area in micro_batches)
    return {"micro_batches": len(rows), "largest": max(rows), "rows": sum(rows), "area": area}


def table(report: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows for a terminal."""
    title = "P={prefix_len}, R={response_len}, G={group_size}, {parts} parts: rows from the plan, nothing was run"
    columns = ["one step", "micro-batches", "rows of the largest", "rows", "fewer rows", "smaller attention area"]
    rows = [
        [
            LABELS[name],
            f"{result['micro_batches']}",
            f"{result['largest']:,}",
            f"{result['rows']:,}",
            f"{result['fewer_rows']:.2f}x",
            f"{result['smaller_area']:.2f}x",
        ]
        for name, result in report["results"].items()
    ]
    return title.format(**report), columns, rows
