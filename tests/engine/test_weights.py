"""Sequence weights and first tokens: what counts in the statistics, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from tests.tiny import make_model, random_ids

QUIET = Runtime(progress=False)
LENGTHS = [12, 7, 12, 9]


def wanda(calibration: CalibrationSet, name: str = "llama", **options: object) -> torch.Tensor:
    model = make_model(name)
    recipe = Recipe(method="wanda", sparsity=0.5, heldout=0, propagate="dense", **options)
    compress(model, None, recipe, QUIET, calibration)
    return torch.cat([m.weight.reshape(-1) for m in model.modules() if isinstance(m, nn.Linear)])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_weight_of_two_is_the_sequence_twice(name: str) -> None:
    ids = random_ids(LENGTHS)
    weighted = CalibrationSet.of(ids, seqlen=12, weights=[1, 2, 1, 3])
    repeated = CalibrationSet.of([ids[i] for i in (0, 1, 1, 2, 3, 3, 3)], seqlen=12)
    agree = (wanda(weighted, name) == wanda(repeated, name)).float().mean()
    assert agree > 0.9999
    assert weighted.calib_id != CalibrationSet.of(ids, seqlen=12).calib_id


def test_equal_weights_are_no_weights() -> None:
    ids = random_ids(LENGTHS)
    plain = CalibrationSet.of(ids, seqlen=12)
    assert CalibrationSet.of(ids, seqlen=12, weights=[1] * 4).calib_id == plain.calib_id
    for bad in ([1, 2], [1, 1, 1, 0], [1, 1, 1, -1], [1, 1, 1, float("nan")]):
        with pytest.raises(ValueError, match="positive weights"):
            CalibrationSet.of(ids, seqlen=12, weights=bad)


def test_first_tokens_do_not_count_when_excluded() -> None:
    """A first token that nothing later attends to must not matter at all."""

    ids = random_ids(LENGTHS)
    changed = [torch.cat([(s[:1] + 1) % 90, s[1:]]) for s in ids]
    results = []
    for sequences in (ids, changed):
        model = make_model("llama")
        recipe = Recipe(
            method="wanda", sparsity=0.5, heldout=0, exclude_first_token=True, targets="0.*q_proj"
        )
        report = compress(model, None, recipe, QUIET, CalibrationSet.of(sequences, seqlen=12))
        assert report.layers[0].tokens == sum(LENGTHS) - len(LENGTHS)
        results.append(
            next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
        )

    assert torch.equal(results[0].weight, results[1].weight)


def test_excluding_first_tokens_changes_the_key() -> None:
    calibration = CalibrationSet.of(random_ids(LENGTHS), seqlen=12)
    keys = {
        compress(
            make_model("llama"),
            None,
            Recipe(method="wanda", sparsity=0.5, exclude_first_token=flag),
            QUIET,
            calibration,
        ).key
        for flag in (False, True)
    }
    assert len(keys) == 2
