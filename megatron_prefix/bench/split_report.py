"""What `bench split` reports: ratios between its paths, and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_prefix.bench.report import worst_difference

PHASES = ("prefix_forward", "responses", "prefix_backward")


def add_ratios(report: dict[str, Any]) -> None:
    """Add what follows from ``results`` and ``by_group_size``.

    ``speed``: median seconds of "unsplit" and of "re_encoded" over those of each path; ``memory_saved``: share of the
    peak of "unsplit" that each path saves; ``rows``: forward rows of each path over those of "unsplit";
    ``response_phase_spread``: how much the peak of the response phase varies over ``by_group_size`` (largest over
    smallest less 1), by path.
    """
    results = report["results"]
    unsplit = results["unsplit"]
    seconds = {name: result["seconds"]["total"]["median"] for name, result in results.items()}
    report["speed"] = {
        f"over_{other}": {name: seconds[other] / own for name, own in seconds.items()}
        for other in ("unsplit", "re_encoded")
    }
    whole = unsplit["peak_bytes"]
    report["memory_saved"] = {name: 1 - result["peak_bytes"] / whole for name, result in results.items()}
    report["rows"] = {name: result["rows"] / unsplit["rows"] for name, result in results.items()}
    spread = {}
    for name in results:
        peaks = [_response_peak(entry["results"][name]) for entry in report["by_group_size"] if _is_split(name)]
        if peaks:
            spread[name] = max(peaks) / min(peaks) - 1
    report["response_phase_spread"] = spread


def _is_split(name: str) -> bool:
    return name.startswith("split_")


def _response_peak(result: Mapping[str, Any]) -> int:
    return result["phase_peak_bytes"]["responses"]


def table(report: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table of paths, of a report whose results are equal."""
    results = report["results"]

    def row(label: str, cell: Callable[[str, Mapping[str, Any]], str]) -> list[str]:
        return [label, *(cell(name, result) for name, result in results.items())]

    def phase(name: str) -> Callable[[str, Mapping[str, Any]], str]:
        return lambda _, result: f"{result['seconds'][name]['median']:.3f}" if name in result["seconds"] else ""

    rows = [
        row("micro-batches", lambda _, result: f"{result['micro_batches']}"),
        row("rows", lambda _, result: f"{result['rows']:,}"),
        row("rows in last MLP", lambda _, result: f"{result['layer_rows']['mlp'][-1]:,}"),
        row("GFLOP", lambda _, result: f"{result['flops'] / 1e9:,.1f}"),
        *(row(f"{name.replace('_', ' ')}, s", phase(name)) for name in PHASES),
        row("whole step, s", phase("total")),
        row("speed over unsplit", lambda name, _: f"{report['speed']['over_unsplit'][name]:.2f}x"),
        row("over re-encoded", lambda name, _: f"{report['speed']['over_re_encoded'][name]:.2f}x"),
        row("peak memory, MiB", lambda _, result: f"{result['peak_bytes'] / 2**20:.1f}"),
        row("less than unsplit", lambda name, _: f"{report['memory_saved'][name]:.0%}"),
        row(
            "in the parts' phase",
            lambda name, result: f"{_response_peak(result) / 2**20:.1f}" if _is_split(name) else "",
        ),
        row("worst difference", lambda name, _: worst_difference(report["differences"].get(name))),
    ]
    sizes = ", ".join(f"{key} {value}" for key, value in report["sizes"].items())
    return f"bench split: {sizes}", ["", *(_header(name) for name in results)], rows


def _header(name: str) -> str:
    return name.replace("split_", "split\n").replace("re_", "re-\n")


def memory_table(report: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    """Title, columns and rows of the table of group sizes: peaks in MiB."""
    splits = list(report["response_phase_spread"])
    columns = ["responses", "parts", "unsplit"]
    for name in splits:
        columns += [_header(name), "its parts'\nphase"]
    rows = []
    for entry in report["by_group_size"]:
        results = entry["results"]
        peaks = [results["unsplit"]["peak_bytes"]]
        for name in splits:
            peaks += [results[name]["peak_bytes"], _response_peak(results[name])]
        cells = [f"{peak / 2**20:.1f}" for peak in peaks]
        rows.append([f"{entry['group_size']}", f"{entry['parts']}", *cells])
    return "peak memory by group size, parts of one size, MiB", columns, rows


def summary(report: Mapping[str, Any]) -> str:
    """What splitting costs and saves, one line for each setting."""
    lines = []
    for name in (name for name in report["results"] if _is_split(name)):
        line = (
            f"{name.replace('_', ' ')}: {report['speed']['over_unsplit'][name]:.2f} of the speed of unsplit, "
            f"{report['speed']['over_re_encoded'][name]:.2f}x that of encoding the prefix for every part, "
            f"{report['memory_saved'][name]:.0%} less memory than unsplit"
        )
        if name in report["response_phase_spread"]:
            first, last = (report["by_group_size"][i]["group_size"] for i in (0, -1))
            line += (
                f"; peak of the responses' phase varies by {report['response_phase_spread'][name]:.2%} "
                f"from G={first} to G={last}"
            )
        lines.append(line)
    return "\n".join(lines)
