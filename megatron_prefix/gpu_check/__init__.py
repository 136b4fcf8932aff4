"""Proof on a GPU, in one program: environment, correctness, determinism and speed of every attention implementation.

Needs torch and this package, nothing else (a picture needs matplotlib). `python -m megatron_prefix.gpu_check` and
`megatron-prefix gpu-check` run the same `program.run_all`.
"""
