"""Tokens a second count what was evaluated, and nothing else."""

from __future__ import annotations

import pytest
import torch

from lm_calib_plugin.harness.speed import Speed

IDS = torch.zeros(2, 5, dtype=torch.int64)


def test_tokens_and_seconds_are_added_up() -> None:
    speed = Speed()
    for _ in range(3):
        with speed.timed("scored", IDS) as count:
            count(IDS.numel())
    with speed.timed("generated", IDS) as count:
        count(7)
    found = speed.summary()
    assert found["scored_tokens"] == 30
    assert found["generated_tokens"] == 7
    assert found["scored_seconds"] >= 0
    assert found["scored_tokens_per_second"] > 0


def test_a_pass_that_fails_and_trials_do_not_count() -> None:
    speed = Speed()

    def fails() -> None:
        with speed.timed("scored", IDS) as count:
            count(10)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        fails()
    with speed.paused(), speed.timed("scored", IDS) as count:
        count(10)
    assert speed.summary() == {}
    with speed.timed("scored", IDS) as count:
        count(10)
    assert speed.summary()["scored_tokens"] == 10
