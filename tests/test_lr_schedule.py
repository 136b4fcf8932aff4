"""Learning-rate schedules: megatron-core's, against their formulas; settings that do not fit are refused."""

import math
from typing import Any

import pytest

from megatron_prefix.mcore.lr_schedule import LrSchedule

PEAK, LOW, WARMUP, LENGTH = 1e-3, 1e-4, 4, 20


class Groups:
    """What a scheduler needs of an optimizer."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def rates(schedule: LrSchedule, updates: int = 24) -> list[float]:
    groups = Groups()
    scheduler = schedule.build(groups, PEAK, 0.1)
    found = []
    for _ in range(updates):
        assert groups.param_groups[0]["lr"] == groups.param_groups[1]["lr"]
        assert [group["weight_decay"] for group in groups.param_groups] == [0.1, 0.0]
        found.append(groups.param_groups[0]["lr"])
        scheduler.step(1)
    return found


def expected(style: str, n: int) -> float:
    if n < WARMUP:
        return PEAK * n / WARMUP
    done = min((n - WARMUP) / (LENGTH - WARMUP), 1.0)
    return {
        "constant": PEAK,
        "linear": LOW + (PEAK - LOW) * (1 - done),
        "cosine": LOW + (PEAK - LOW) * (1 + math.cos(math.pi * done)) / 2,
        "inverse-square-root": PEAK * math.sqrt(WARMUP / n) if n <= LENGTH else LOW,
        "WSD": LOW + (PEAK - LOW) * min(1.0, max(0.0, (LENGTH - n) / 5)),
    }[style]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_the_rate_of_every_update(style: str) -> None:
    schedule = LrSchedule(style, WARMUP, LENGTH, 5 if style == "WSD" else None, LOW)
    schedule.check(PEAK)
    assert rates(schedule) == pytest.approx([expected(style, n) for n in range(24)])


def test_without_settings_the_rate_is_constant() -> None:
    LrSchedule().check(PEAK)
    assert rates(LrSchedule()) == [PEAK] * 24


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lr_decay_style": "steps"},
            "lr_decay_style must be one of constant, linear, cosine, inverse-square-root, WSD",
        ),
        ({"lr_warmup_steps": -1}, "lr_warmup_steps must be at least 0, got -1"),
        ({"min_lr": 2e-3}, "min_lr must be between 0 and the learning rate 0.001, got 0.002"),
        ({"lr_decay_style": "WSD", "lr_decay_steps": 9}, "lr_wsd_decay_steps is the length of the decay"),
        ({"lr_wsd_decay_steps": 9}, "lr_wsd_decay_steps is the length of the decay"),
        ({"lr_decay_style": "cosine"}, "lr_decay_style 'cosine' needs lr_decay_steps"),
        ({"lr_decay_style": "linear", "lr_decay_steps": 3, "lr_warmup_steps": 3}, "more than the 3 of lr_warmup_steps"),
        (
            {"lr_decay_style": "WSD", "lr_decay_steps": 9, "lr_warmup_steps": 3, "lr_wsd_decay_steps": 7},
            "lr_wsd_decay_steps must be between 1 and 6, got 7",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LrSchedule(**changes).check(PEAK)
