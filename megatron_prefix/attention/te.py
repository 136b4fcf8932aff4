"""`impl="te"`: Transformer Engine's fused attention (cuDNN) on packed sequences, for Hopper and Blackwell.

The calls of a layout run in place on the packed tensors: ranges that leave gaps are passed by their offsets, so no key
and no query is gathered.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from megatron_prefix.attention.calls import VarlenCall
from megatron_prefix.attention.te_library import FusedAttention, TeSupport, cudnn_version, installed_version, load


class TeKernel:
    """See `megatron_prefix.attention.kernels.Kernel`. Transformer Engine is imported when it is first asked for."""

    mixed_head_dims = True
    contiguous = True

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, head_dim_v: int) -> str | None:
        """CUDA tensors that Transformer Engine, cuDNN and the GPU can train with, see `TeSupport.refusal`."""
        if device.type != "cuda":
            return f"impl='te' runs on CUDA, the tensors are on {device}; use impl='sdpa'"
        if isinstance(self._te, str):
            return self._te
        deterministic = torch.are_deterministic_algorithms_enabled()
        refusal = self.support(device).refusal(dtype, head_dim, head_dim_v, deterministic)
        if refusal is None:
            try:
                self.functions(device)
            except ImportError as error:
                return f"impl='te' cannot use what is installed: {error}"
        return refusal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: VarlenCall, softmax_scale: float) -> tuple[Tensor, Tensor]:
        """One launch for the whole call."""
        return self.functions(q.device).forward(q, k, v, call, softmax_scale)

    def backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        qkv: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        lse: Tensor,
        call: VarlenCall,
        softmax_scale: float,
    ) -> None:
        """One launch for the whole call, added where the rows stand.

        Raises:
            ValueError: deterministic algorithms are asked for, and cuDNN's would need more memory than the GPU has.
        """
        deterministic = torch.are_deterministic_algorithms_enabled()
        if deterministic:
            self.check_workspace(call, heads=dout.shape[1], device=dout.device)
        library = self.functions(dout.device)
        parts = library.backward(dout, qkv, out, lse, call, softmax_scale, deterministic)
        for total, rows, part in zip(grads, (call.q, call.kv, call.kv), parts, strict=True):
            rows.add(total, part)

    def check_workspace(self, call: VarlenCall, heads: int, device: torch.device) -> None:
        """Refuse a deterministic backward that would run out of memory: on sm90 its workspace is quadratic.

        Raises:
            ValueError: names the bytes that it needs and that there are.
        """
        if self.support(device).arch != (9, 0):
            return
        needed, free = deterministic_workspace(call, heads), free_bytes(device)
        if needed > free:
            raise ValueError(
                f"impl='te' needs {needed / 2**30:.1f} GiB of workspace for a deterministic backward of "
                f"{len(call.q.ranges)} x {call.q.max_seqlen} queries, {heads} heads and {call.kv.max_seqlen} keys, "
                f"{free / 2**30:.1f} GiB are free; use smaller micro-batches, impl='flash', or "
                "torch.use_deterministic_algorithms(False)"
            )

    def support(self, device: torch.device) -> TeSupport:
        """What decides on ``device``; Transformer Engine must be installed."""
        assert not isinstance(self._te, str)
        return TeSupport(self._te, self._cudnn, torch.cuda.get_device_capability(device))

    def functions(self, device: torch.device) -> FusedAttention:
        """Transformer Engine's functions, as they work on ``device`` (the GPUs of a process are of one kind)."""
        if self._library is None:
            self._library = load(self.support(device))
        return self._library

    _library: FusedAttention | None = None

    @cached_property
    def _te(self) -> tuple[int, int] | str:
        return installed_version()

    @cached_property
    def _cudnn(self) -> tuple[int, int, int]:
        return cudnn_version()


def deterministic_workspace(call: VarlenCall, heads: int) -> int:
    """Bytes that cuDNN's deterministic backward of packed sequences takes on sm90.

    Source: a note in Transformer Engine's ``dot_product_attention/utils.py``: about 128 B H Sq Skv for B = 2 sequences,
    and four times as much for B = 4, hence 64 B^2 H Sq Skv, and at least 128 H Sq Skv.
    """
    batch = len(call.q.ranges)
    return max(128 * batch, 64 * batch**2) * heads * call.q.max_seqlen * call.kv.max_seqlen


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a GPU: those of the driver, and those that torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
