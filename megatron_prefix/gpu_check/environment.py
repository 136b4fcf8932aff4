"""What a check runs on: the GPU, its driver and libraries, and the packages whose kernels are checked."""

from __future__ import annotations

import re
from typing import Any

import torch

from megatron_prefix.apex import find_apex
from megatron_prefix.attention import IMPLS, check_impl
from megatron_prefix.measure import PACKAGES, git_commit, machine_info, utc_date

OLDEST_TORCH = (2, 11)
ALL_IMPLS = tuple(name for name in IMPLS if name != "auto")


def check_can_run(device: str) -> None:
    """Refuse before any work what cannot work.

    Raises:
        ValueError: a torch that is too old, or no GPU; says what is missing.
    """
    found = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        raise ValueError(f"torch {torch.__version__} is too old; install torch 2.11 or newer")
    if device == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else f"was built for CUDA {torch.version.cuda}"
        raise ValueError(
            f"no CUDA GPU: torch {torch.__version__} {built}, and torch.cuda.is_available() is False; run on a machine "
            "with an NVIDIA GPU and torch for CUDA, or try the program itself with --device cpu"
        )


def describe(device: str, *, quick: bool) -> dict[str, Any]:
    """The head of a report: JSON values. Keys: check, date, commit, device, quick, machine, versions, apex."""
    machine = machine_info()
    return {
        "check": "gpu-check",
        "date": utc_date(),
        "commit": git_commit(),
        "device": device,
        "quick": quick,
        "versions": {"python": machine.pop("python"), **machine.pop("versions")},
        "machine": machine,
        "apex": find_apex().note,
    }


def environment_lines(head: dict[str, Any]) -> list[str]:
    """The head in words."""
    machine, versions = head["machine"], head["versions"]
    rows = [("commit", head["commit"] or "unknown (no git checkout)"), ("date", head["date"])]
    if cuda := machine["cuda"]:
        for gpu in cuda["devices"]:
            rows.append(("GPU", f"{gpu['name']}, sm {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"))
        shown = f"{cuda['runtime']}, driver {cuda['driver'] or 'unknown'}, cuDNN {cuda['cudnn'] or 'none'}"
        rows.append(("CUDA", shown))
    else:
        rows.append(("GPU", "none"))
    rows.append(("CPU", f"{machine['cpu']}, {machine['cores']} cores"))
    rows += [(name, versions.get(name, "not installed")) for name in ("python", *PACKAGES) if name != "apex"]
    return [f"{name:24} {value}" for name, value in (*rows, ("apex", head["apex"]))]


def refusal(
    impl: str, device: torch.device, dtype: torch.dtype, dims: tuple[int, int], *, needs_kernel: bool = False
) -> str | None:
    """Why ``impl`` does not run there, in its own words, or None.

    Args:
        dims: head dims of q and k, and of v.
        needs_kernel: whether it must be one that context parallelism and split groups can use.
    """
    try:
        check_impl(impl, device, dtype, *dims, has_parts=needs_kernel)
    except ValueError as error:
        return str(error)
    return None
