"""`python -m megatron_prefix` is the `megatron-prefix` command; torchrun starts it this way."""

from megatron_prefix.cli.main import main

if __name__ == "__main__":
    main(prog_name="megatron-prefix")
