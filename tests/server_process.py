"""Start `openai_server.py` as a process of its own and talk to its test endpoints."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent / "openai_server.py"


class ServerProcess:
    """A running server. ``url`` is its address."""

    def __init__(self, url: str) -> None:
        self.url = url

    def fault(self, kind: str | None, times: int = 1, value: Any = None) -> None:
        """Make the next requests fail."""
        self._ask("/test/fault", {"kind": kind, "times": times, "value": value})

    def seen(self) -> dict[str, Any]:
        """What was asked since the start."""
        return self._ask("/test/seen")

    def _ask(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
            return json.load(answer)


@contextmanager
def serving(folder: Path) -> Iterator[ServerProcess]:
    """A server of the Hugging Face model in ``folder``, ended with the block."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            assert port, "the server ended before it served"
            yield ServerProcess(f"http://127.0.0.1:{port}")
        finally:
            process.stdin.close()
            process.wait(30)
