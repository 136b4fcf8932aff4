"""The command line: `megatron-prefix`, also `python -m megatron_prefix`."""
