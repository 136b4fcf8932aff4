"""`python -m megatron_prefix.gpu_check`: the check where only torch is installed.

Exit code 0: all that ran is right. 1: something failed. 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_prefix.gpu_check.program import (
    DEFAULT_OUT,
    DEFAULT_SECONDS,
    DEVICES,
    PlainOutput,
    Settings,
    draw,
    read_report,
    run_all,
)


def main() -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m megatron_prefix.gpu_check", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="the CPU tries the program itself")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="then skip what is left")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="JSON; the picture stands beside it")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="only draw the picture of an earlier run")
    given = parser.parse_args()
    output = PlainOutput()
    try:
        if given.draw:
            output.line(f"picture: {draw(read_report(given.draw), given.draw)}")
            return 0
        report = run_all(Settings(given.device, given.quick, given.seconds, given.out), output)
    except (ValueError, ImportError) as error:
        sys.stderr.write(f"Error: {error}\n")
        return 2
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
