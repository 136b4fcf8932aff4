"""The commands that the README and examples/ show: in code blocks, between backquotes, in the heads of scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = (
    *("megatron-prefix", "python", "torchrun", "deepspeed", "bash", "sbatch", "kubectl"),
    *("vllm", "git", "pip", "patch"),
)
COMMAND = re.compile(rf"(?:\w+=\S* )*(?:{'|'.join(map(re.escape, PROGRAMS))})(?: |$)")
BENCH = re.compile(r"(?:attention|step|split) --")  # in a table whose head says `megatron-prefix bench`
UNCOMMENTED = re.compile(r"""(?:'[^']*'|"[^"]*"|[^\s'"]|\s+(?![#\s]))*""")
SETTING = re.compile(r"export |cd |source |(?:\w+=\S* ?)+$")
MARK = "GPU only"


@dataclass(frozen=True)
class Shown:
    """A command as shown: on one line, without comment.

    Attributes:
        place: file and line.
        command: words between single blanks.
        gpu_only: marked so in place: in a comment behind it or above it in its block, in its paragraph or, in the head
            of a script, on its line.
    """

    place: str
    command: str
    gpu_only: bool


def shown_commands(path: Path, root: Path) -> list[Shown]:
    """Of a page (.md) or of the head of a script."""
    text = path.read_text(encoding="utf-8")
    found = _of_page(text) if path.suffix == ".md" else _of_head(text, path.suffix)
    name = path.relative_to(root).as_posix()
    return [Shown(f"{name}:{text.count(chr(10), 0, at) + 1}", " ".join(line.split()), gpu) for at, line, gpu in found]


def _of_page(text: str) -> Iterator[tuple[int, str, bool]]:
    """(offset, command, whether it is marked)."""
    prose = list(text)
    for block in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        prose[block.start() : block.end()] = re.sub(r"[^\n]", " ", block[0])
        if block[1] in ("", "bash", "sh", "console"):
            yield from _of_block(block[2], block.start(2), any_program=block[1] != "")
    for paragraph in re.finditer(r"(?:[^\n]*\S[^\n]*\n)+", "".join(prose)):
        for span in re.finditer(r"`([^`]+)`", paragraph[0]):
            command = " ".join(span[1].split())
            command = f"megatron-prefix bench {command}" if BENCH.match(command) else command
            # `megatron-prefix plan` alone is the name of a command.
            if COMMAND.match(command) and re.search(r" -|\.(py|sh)\b", command):
                yield paragraph.start() + span.start(), command, MARK in paragraph[0]


def _of_block(code: str, start: int, any_program: bool) -> Iterator[tuple[int, str, bool]]:
    marked = False
    for line in re.finditer(r"(?:[^\n]*\\\n)*[^\n]+", code):
        text = re.sub(r"\\\n\s*", "", line[0]).strip().removeprefix("$ ")
        if text.startswith("#"):
            marked = marked or MARK in text
            continue
        match = UNCOMMENTED.match(text)
        command = match[0] if match else ""
        if COMMAND.match(command) or (any_program and not SETTING.match(command)):
            yield start + line.start(), command, marked or MARK in text[len(command) :]


def _of_head(text: str, suffix: str) -> Iterator[tuple[int, str, bool]]:
    """From the docstring of a Python file, or the comments of another."""
    pattern = r"^    (\S.*)$" if suffix == ".py" else r"^#   (\S.*)$"
    end = text.find('"""', 3) if suffix == ".py" else len(text)
    for line in re.finditer(pattern, text[:end], flags=re.MULTILINE):
        command, _, rest = line[1].partition("  ")
        if COMMAND.match(command):
            yield line.start(), command, MARK in rest
