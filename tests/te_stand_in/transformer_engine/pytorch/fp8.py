"""FP8 is off."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FP8GlobalStateManager:
    """Whether FP8 is on."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


@contextmanager
def fp8_autocast(enabled: bool = True, **_: Any) -> Iterator[None]:
    assert not enabled
    yield


@contextmanager
def fp8_model_init(enabled: bool = True, **_: Any) -> Iterator[None]:
    assert not enabled
    yield
