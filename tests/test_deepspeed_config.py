"""DeepSpeed configurations: what is filled in, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.mcore.lr_schedule import LrSchedule
from megatron_prefix.mcore.training import TrainSettings

pytestmark = pytest.mark.ci_oldest
deepspeed_config = pytest.importorskip("megatron_prefix.deepspeed.config")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "deepspeed"
SETTINGS = TrainSettings(learning_rate=3e-4, weight_decay=0.1, clip_grad=0.5, schedule=LrSchedule())
BF16, FP32 = torch.bfloat16, torch.float32


def complete(config: dict[str, Any], dtype: torch.dtype = FP32, **changes: Any) -> dict[str, Any]:
    settings = TrainSettings(**({"learning_rate": 3e-4, "weight_decay": 0.1, "clip_grad": 0.5} | changes))
    return deepspeed_config.engine_config(config, settings, dtype, 8)


def test_the_values_of_the_run_are_filled_in() -> None:
    adam = {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True, "betas": [0.9, 0.95]}}
    given = {"zero_optimization": {"stage": 2}, "optimizer": adam, "bf16": {"enabled": "auto"}}
    before = json.dumps(given)
    found = complete(given, BF16)
    assert json.dumps(given) == before, "the caller's is left alone"
    assert found["gradient_clipping"] == 0.5 and found["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert found["optimizer"]["params"] == {
        "lr": 3e-4, "weight_decay": 0.1, "torch_adam": True, "betas": [0.9, 0.95]
    }  # fmt: skip
    assert found["train_micro_batch_size_per_gpu"] == found["gradient_accumulation_steps"] == 1
    assert deepspeed_config.zero_stage(found) == 2 and deepspeed_config.grad_dtype(found, BF16) is BF16
    same = {"train_batch_size": 8, "gradient_clipping": 0.5, "data_types": {"grad_accum_dtype": "fp32"}}
    assert deepspeed_config.grad_dtype(complete(same, BF16), BF16) is FP32


TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimisation": {"stage": 2}}, "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
    ({"nonsense": 1}, "unknown key 'nonsense'; leave it out"),
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "overlap_com"),
    ({"zero_optimization": {"stage": 4}}, "Input should be 0, 1, 2, 3"),
    ({"zero_optimization": 2}, "DeepSpeed refuses this configuration"),
    ({"fp16": {"enabled": True}}, "'fp16' cannot be used here: there are no fp16 models here; use bf16"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler' cannot be used here: the learning rate follows"),
    ({"pipeline": {}}, "use pp=1"),
    ({"bf16": {"enabled": True}}, "bf16.enabled is True, but False by --dtype"),
    ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but 0.5 by --clip-grad"),
    ({"train_batch_size": 16}, "train_batch_size is 16, but 8 by --groups-per-step"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4, but 1 by this engine"),
    ({"optimizer": {"type": "AdamW"}}, "compiles C++ for minutes on a machine without a GPU"),
    ({"optimizer": {"type": "Lamb", "params": {}}}, "optimizer.type must be Adam or AdamW, got 'Lamb'"),
    ({"optimizer": {"type": "Adam", "params": {"torch_adm": True}}}, "did you mean 'torch_adam'?"),
    ({"optimizer": {"type": "Adam", "parms": {}}}, "unknown key 'optimizer.parms'"),
    ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, "optimizer.params.lr is 0.001, but 0.0003 by --lr"),
    (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "optimizer": TORCH_ADAM},
        '"zero_force_ds_cpu_optimizer": false',
    ),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload to cpu"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        complete(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"distributed_optimizer": True}, FP32, "--distributed-optimizer is of megatron-core's engine"),
        ({"overlap_grad_reduce": True}, FP32, "--overlap-grad-reduce is of megatron-core's engine"),
        ({"optimizer": "sgd"}, FP32, "--optimizer sgd with DeepSpeed"),
        ({"clip_grad": 0.0}, torch.float64, "fp32 or bf16, the model is in torch.float64"),
    ],
)
def test_settings_of_the_other_engine_are_refused(changes: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        complete({}, dtype, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no DeepSpeed configuration"), ("[]", "got list"), ('{"a": 1, "a": 2}', "key 'a' comes twice")],
)
def test_files_that_hold_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        deepspeed_config.read_config(path)
    with pytest.raises(ValueError, match="name a DeepSpeed configuration"):
        deepspeed_config.read_config(tmp_path / "none.json")


STAGE_OF = {
    "cpu_zero2": 2, "ulysses_zero1": 1, "zero1_bf16_tp": 1, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3
}  # fmt: skip
GPU_ONLY = ("zero2_offload", "zero3_offload")


def test_there_is_a_stage_for_every_example() -> None:
    assert sorted(STAGE_OF) == sorted(path.stem for path in EXAMPLES.glob("*.json"))


@pytest.mark.parametrize("name", STAGE_OF)
def test_examples_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = deepspeed_config.read_config(EXAMPLES / f"{name}.json")
    if name in GPU_ONLY:
        with pytest.raises(ValueError, match="on a machine without a GPU"):
            deepspeed_config.engine_config(config, SETTINGS, BF16)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dtype = FP32 if name == "cpu_zero2" else BF16
    assert deepspeed_config.zero_stage(deepspeed_config.engine_config(config, SETTINGS, dtype)) == STAGE_OF[name]
