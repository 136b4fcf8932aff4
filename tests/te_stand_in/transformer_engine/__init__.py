"""A stand-in for Transformer Engine that computes on the CPU, for one rank: only what dense GPT layers need.

megatron-core takes it for the real one. It is on the path of child processes of tests/test_te_specs.py and
tests/test_ms_swift.py alone. Names, signatures, parameter names and what is returned are those of Transformer Engine
2.8 to 2.20; the mathematics is plain torch, in the dtype of the input.
"""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.8.0"
