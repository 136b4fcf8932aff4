"""Run a script of Megatron-LM's kind on the CPU: `python -m tests.pretrain_on_cpu SCRIPT ARGUMENTS`, under torchrun.

Beyond `run_on_cpu`, Megatron-LM's start-up asks for a GPU in four places, and compiles what the wheel has compiled.
"""

import runpy
import sys
from functools import partial
from types import SimpleNamespace

import torch

from megatron_prefix.mcore.cpu import run_on_cpu


def main() -> None:
    run_on_cpu()
    torch.distributed.init_process_group("gloo")
    import megatron.core.datasets.utils
    import megatron.training.training
    from megatron.training.initialize import initialize_megatron

    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=9, name="none")
    megatron.core.datasets.utils.compile_helpers = lambda: None
    # It draws random numbers, as many as a rank has rows: models would differ.
    megatron.training.training.set_jit_fusion_options = lambda **_: None
    megatron.training.training.initialize_megatron = partial(initialize_megatron, allow_no_cuda=True)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
