"""Rows of split groups by the planner, against the published case and hand counts."""

import json

import pytest
from click.testing import CliRunner

from megatron_prefix.bench.group import GroupSizes
from megatron_prefix.bench.planned_rows import planned_rows, table
from megatron_prefix.cli.main import main


def test_the_published_case() -> None:
    """m = 4 parts, G = 16, P = 16384, R = 1024: 8.50x fewer rows than repeated; 3.40x with the prefix in every part."""
    report = planned_rows(GroupSizes(16384, 1024, 16), 4)
    rows = {name: result["rows"] for name, result in report["results"].items()}
    assert rows == {"repeated": 16 * (16384 + 1024), "re_encoded": 4 * (16384 + 4 * 1024), "split": 16384 + 16 * 1024}
    ratios = {name: round(result["fewer_rows"], 6) for name, result in report["results"].items()}
    assert ratios == {"repeated": 1.0, "re_encoded": 3.4, "split": 8.5}
    assert [result["micro_batches"] for result in report["results"].values()] == [16, 4, 5] and report["parts"] == 4
    assert [result["largest"] for result in report["results"].values()] == [17408, 20480, 16384]
    title, columns, lines = table(report)
    assert "P=16384, R=1024, G=16, 4 parts" in title and len(columns) == 6
    assert [line[4] for line in lines] == ["1.00x", "3.40x", "8.50x"]


def test_bench_split_dry_run_prints_it() -> None:
    sizes = ["--prefix-len", "16384", "--response-len", "1024", "--group-size", "16", "--parts", "4"]
    run = CliRunner().invoke(main, ["bench", "split", "--dry-run", "--json", *sizes])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found == planned_rows(GroupSizes(16384, 1024, 16), 4)
    assert "8.50x" in run.stderr and "3.40x" in run.stderr
    refused = CliRunner().invoke(main, ["bench", "split", "--dry-run", "--parts", "99"])
    assert refused.exit_code == 2 and "parts must be from 2" in refused.stderr


def test_parts_of_unequal_size() -> None:
    results = planned_rows(GroupSizes(10, 3, 5), 2)["results"]
    assert results["split"] == {
        "micro_batches": 3, "largest": 10, "rows": 25, "area": 55 + 5 * (6 + 30),
        "fewer_rows": 65 / 25, "smaller_area": (5 * 91) / (55 + 180),
    }  # fmt: skip
    assert results["re_encoded"]["rows"] == 2 * 10 + 15 and results["re_encoded"]["area"] == 2 * 55 + 180


@pytest.mark.parametrize("parts", [1, 6])
def test_refused(parts: int) -> None:
    with pytest.raises(ValueError, match=f"parts must be from 2 to the number of responses, 5, got {parts}"):
        planned_rows(GroupSizes(10, 3, 5), parts)
