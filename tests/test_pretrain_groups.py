"""examples/megatron_lm/pretrain_groups.py in Megatron-LM's own `pretrain`, as the wheel ships it, on the CPU."""

import math
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli_runs import write_groups
from tests.launching import environment

ROOT = Path(__file__).resolve().parents[1]
ARGUMENTS = shlex.split("""
--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
--num-query-groups 2 --seq-length 40 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm
--disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
--transformer-impl local --use-cpu-initialization --no-gradient-accumulation-fusion --no-masked-softmax-fusion
--no-persist-layer-norm --no-rope-fusion --vocab-size 64 --make-vocab-size-divisible-by 1 --distributed-backend gloo
--micro-batch-size 1 --global-batch-size 4 --train-iters 4 --lr 1e-2 --lr-decay-style constant --log-interval 1
--eval-iters 0 --eval-interval 100 --calculate-per-token-loss --spec megatron_prefix.specs local_rmsnorm
""")
STEP = re.compile(r"lm loss: (\S+) .* grad norm: (\S+) ")

pytestmark = [
    pytest.mark.ci_newest,
    pytest.mark.skipif(
        find_spec("megatron.training") is None, reason="this megatron-core ships no megatron/training (0.19 does)"
    ),
]


def test_the_loss_falls_and_does_not_depend_on_the_ranks(tmp_path: Path) -> None:
    """One rank, then two context-parallel ones: same losses, same norms of the gradient."""
    rollouts = write_groups(tmp_path, 12)
    alone = _steps(rollouts, 1)
    losses = [loss for loss, _ in alone]
    assert len(losses) == 4
    assert losses[0] == pytest.approx(math.log(64), abs=0.1)  # as good as a guess
    assert losses[-1] < losses[0] - 0.2
    shared = _steps(rollouts, 2, "--context-parallel-size", "2")
    for (loss, norm), (expected_loss, expected_norm) in zip(shared, alone, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, abs=2e-3)  # printed with three digits


def _steps(rollouts: Path, ranks: int, *sizes: str) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of every step, as Megatron-LM logs them."""
    # megatron-core's fused functions would be compiled for minutes.
    variables = environment(CUDA_DEVICE_MAX_CONNECTIONS=1, TORCHDYNAMO_DISABLE=1)
    script = str(ROOT / "examples" / "megatron_lm" / "pretrain_groups.py")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    command += ["-m", "tests.pretrain_on_cpu", script, "--rollouts", str(rollouts), *ARGUMENTS, *sizes]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return [(float(loss), float(norm)) for loss, norm in STEP.findall(run.stdout)]
