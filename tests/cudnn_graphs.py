"""Which graphs of `impl="te"` cuDNN accepts for which GPU, asked without one: `main` prints what it found as JSON.

cuDNN answers for the properties of a device that it is told of (``device_property`` of a cudnn-frontend graph). The
graphs are those that Transformer Engine builds for packed sequences: ragged q, k, v, out and log-sum-exp, a padding
mask by lengths, and a top-left causal mask for the own calls. Nothing is compiled or run.

A program of its own: cuDNN wants the GPU driver's library, which is not there; see `tests/test_cudnn_support`.
"""

import json
import sys
from typing import Any

import cudnn

ROWS = {"own": (2048, 2048), "ancestors": (2048, 1024)}
QUERY_HEADS, KEY_HEADS, SEQUENCES = 32, 8, 3
FLOAT, BF16 = cudnn.data_type.FLOAT, cudnn.data_type.BFLOAT16

# name, compute capability, multiprocessors, shared memory per block, L2 cache: as published
DEVICES: dict[str, tuple[str, int, int, int, int]] = {
    "a100": ("NVIDIA A100", 800, 108, 166912, 41943040),
    "h100": ("NVIDIA H100", 900, 132, 232448, 52428800),
    "b200": ("NVIDIA B200", 1000, 148, 232448, 132644864),
    "rtx": ("NVIDIA RTX PRO 6000 Blackwell", 1200, 188, 101376, 134217728),
}


def device_property(name: str) -> Any:
    label, version, processors, shared_memory, cache = DEVICES[name]
    properties = {
        "deviceName": label, "deviceVer": version, "multiProcessorCount": processors, "l2CacheSize": cache,
        "maxSharedMemoryPerBlockOptin": shared_memory, "maxSharedMemoryPerBlock": 49152,
        "reservedSharedMemoryPerBlock": 1024, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0,
        "isTccDriver": 0, "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64],
        "maxCtasPerSM": 32, "maxRegistersPerSM": 65536, "regsPerBlock": 65536, "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": 2048, "warpSize": 32, "supportCoopLaunch": 1, "totalGlobalMem": 85_000_000_000,
        "smClockRateKHz": 1_980_000, "memClockRateKHz": 2_619_000,
    }  # fmt: skip
    return cudnn.create_device_properties(json.dumps(properties))


class Graph:
    """One call's graph, forward or backward."""

    def __init__(self, device: str, call: str, dims: tuple[int, int]) -> None:
        _, version, processors, *_ = DEVICES[device]
        self.packed_stats = version < 1200  # else [B, H, rows, 1], as Transformer Engine has it there
        self.rows_q, self.rows_kv = ROWS[call]
        self.dim, self.dim_v = dims
        self.graph = cudnn.pygraph(
            io_data_type=BF16, intermediate_data_type=FLOAT, compute_data_type=FLOAT,
            device_property=device_property(device), sm_version=version // 10, sm_count=processors,
        )  # fmt: skip
        self.offsets = {name: self._offsets(name) for name in ("q", "k", "v", "o", "stats")}
        lengths = [
            self.graph.tensor(
                name=f"len_{x}", dim=[SEQUENCES, 1, 1, 1], stride=[1] * 4, data_type=cudnn.data_type.INT32
            )
            for x in ("q", "kv")
        ]
        self.mask: dict[str, Any] = {"use_padding_mask": True, "seq_len_q": lengths[0], "seq_len_kv": lengths[1]}
        if call == "own":
            self.mask |= {"diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
        self.q = self._tensor("q", QUERY_HEADS, self.rows_q, self.dim)
        self.k = self._tensor("k", KEY_HEADS, self.rows_kv, self.dim)
        self.v = self._tensor("v", KEY_HEADS, self.rows_kv, self.dim_v)

    def _offsets(self, name: str) -> Any:
        return self.graph.tensor(
            name=f"off_{name}", dim=[SEQUENCES + 1, 1, 1, 1], stride=[1] * 4, data_type=cudnn.data_type.INT64
        )

    def _shape(self, heads: int, rows: int, width: int) -> tuple[list[int], list[int]]:
        return [SEQUENCES, heads, rows, width], [heads * rows * width, width, heads * width, 1]

    def _tensor(self, name: str, heads: int, rows: int, width: int, data_type: Any = BF16, like: str = "") -> Any:
        dim, stride = self._shape(heads, rows, width)
        offset = self.offsets[like or name]
        return self.graph.tensor(name=name, dim=dim, stride=stride, data_type=data_type, ragged_offset=offset)

    def _output(self, tensor: Any, heads: int, rows: int, width: int, like: str) -> Any:
        dim, stride = self._shape(heads, rows, width)
        return tensor.set_output(True).set_dim(dim).set_stride(stride).set_ragged_offset(self.offsets[like])

    def _stats(self, stats: Any) -> Any:
        """The log-sum-exp row by row as q, or dense."""
        if self.packed_stats:
            return self._output(stats, QUERY_HEADS, self.rows_q, 1, "stats")
        stride = [QUERY_HEADS * self.rows_q, self.rows_q, 1, 1]
        return stats.set_output(True).set_dim([SEQUENCES, QUERY_HEADS, self.rows_q, 1]).set_stride(stride)

    def _given_stats(self) -> Any:
        if self.packed_stats:
            return self._tensor("stats", QUERY_HEADS, self.rows_q, 1, FLOAT)
        stride = [QUERY_HEADS * self.rows_q, self.rows_q, 1, 1]
        dim = [SEQUENCES, QUERY_HEADS, self.rows_q, 1]
        return self.graph.tensor(name="stats", dim=dim, stride=stride, data_type=FLOAT)

    def forward(self) -> None:
        out, stats = self.graph.sdpa(q=self.q, k=self.k, v=self.v, attn_scale=0.1, generate_stats=True, **self.mask)
        self._output(out, QUERY_HEADS, self.rows_q, self.dim_v, "o")
        self._stats(stats).set_data_type(FLOAT)
        self._check()

    def backward(self, deterministic: bool) -> None:
        out = self._tensor("o", QUERY_HEADS, self.rows_q, self.dim_v)
        dout = self._tensor("do", QUERY_HEADS, self.rows_q, self.dim_v, like="o")
        stats = self._given_stats()
        totals = {"max_total_seq_len_q": self.rows_q, "max_total_seq_len_kv": self.rows_kv} if self.packed_stats else {}
        dq, dk, dv = self.graph.sdpa_backward(
            q=self.q, k=self.k, v=self.v, o=out, dO=dout, stats=stats, attn_scale=0.1,
            use_deterministic_algorithm=deterministic, **totals, **self.mask,
        )  # fmt: skip
        self._output(dq, QUERY_HEADS, self.rows_q, self.dim, "q")
        self._output(dk, KEY_HEADS, self.rows_kv, self.dim, "k")
        self._output(dv, KEY_HEADS, self.rows_kv, self.dim_v, "v")
        self._check()

    def _check(self) -> None:
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans([cudnn.heur_mode.A])
        self.graph.check_support()


def accepted(device: str, call: str, dims: tuple[int, int], step: str) -> bool:
    """Whether cuDNN has a kernel; ``step`` is "forward", "backward" or "deterministic"."""
    try:
        graph = Graph(device, call, dims)
        if step == "forward":
            graph.forward()
        else:
            graph.backward(deterministic=step == "deterministic")
    except (RuntimeError, cudnn.cudnnGraphNotSupportedError):
        return False
    return True


def main() -> None:
    dims = [tuple(each) for each in json.loads(sys.argv[1])]
    steps = ("forward", "backward", "deterministic")
    found = [
        {"device": device, "call": call, "dims": pair, "step": step, "accepted": accepted(device, call, pair, step)}
        for device in DEVICES
        for pair in dims
        for call in ROWS
        for step in steps
    ]
    print(json.dumps({"cudnn": cudnn.backend_version(), "graphs": found}))  # noqa: T201 - the answer to the parent


if __name__ == "__main__":
    main()
