"""Base classes that megatron-core derives from when it is imported."""

from . import recipe

__all__ = ["recipe"]
