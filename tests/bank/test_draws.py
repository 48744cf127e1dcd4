"""Resampled draws are what compressing with the resampled sequences gives, and cost no pass."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, compress
from lm_calib_plugin.bank import Part
from lm_calib_plugin.bank.draws import Draws, LayerDraws, draw_uncertainty, resampled
from lm_calib_plugin.errors import UserError
from tests.bank.tools import QUIET, inputs_of, opened, output_error, state_of, text
from tests.methods import method_of
from tests.tiny import make_model

POOL = text("b", [12, 7, 12, 9, 11, 12], 1)
JUDGE, OTHER = text("b", [10, 12, 5], 2), text("c", [12, 12], 3)
PARTS = [Part("b", "choose", POOL), Part("b", "judge", JUDGE), Part("c", "judge", OTHER)]
GROUPED = [Part("b", "choose", text("b", [12] * 20, 4), groups=16), *PARTS[1:]]
OPTIONS = {
    "wanda": {"sparsity": 0.5},
    "ria": {"sparsity": 0.4},
    "magnitude": {"sparsity": 0.5},
    "sparsegpt": {"sparsity": 0.5},
    "gptq": {"bits": 3, "group_size": 8},
    "rtn": {"bits": 3, "group_size": 8},
}


def recipe_of(name: str) -> Recipe:
    return Recipe(method=name, **OPTIONS[name], propagate="dense", heldout=0)


def method_named(name: str) -> object:
    recipe = recipe_of(name)
    return recipe.make_method()


def repeated(pool: CalibrationSet, counts: torch.Tensor) -> CalibrationSet:
    """Write a draw out: every sequence as often as it was drawn."""
    sequences = []
    for sequence, count in zip(pool.sequences, counts.tolist(), strict=True):
        for _ in range(int(count)):
            sequences.append(sequence)
    return CalibrationSet.of(sequences, seqlen=24)


def compressed(name: str, calibration: CalibrationSet) -> dict[str, torch.Tensor]:
    other = make_model("llama")
    compress(other, None, recipe_of(name), QUIET, calibration)
    return {n: m.weight.detach() for n, m in other.named_modules() if hasattr(m, "weight")}


@pytest.mark.parametrize("name", ["wanda", "ria", "sparsegpt", "gptq"])
def test_draws_are_compressions_with_the_resampled_sequences(name: str, tmp_path: Path) -> None:
    grouped = name in ("sparsegpt", "gptq")
    parts = GROUPED if grouped else PARTS
    model, layers, bank = opened(tmp_path, parts)
    draws = draw_uncertainty(
        bank, layers, method_named(name), "b", nsamples=5, domains=["b", "c"], draws=4, rows=None
    )
    pool = parts[0].calibration
    if grouped:
        sets = resampled(16, round(5 * 16 / 20), 4, 0)
        counts = torch.stack([c[[i % 16 for i in range(20)]] for c in sets])
    else:
        counts = resampled(6, 5, 4, 0)
    assert torch.equal(draws.counts, counts)
    results = [compressed(name, repeated(pool, c)) for c in counts]
    judged = [inputs_of(model, s.sequences) for s in (JUDGE, OTHER)]
    for found in draws.layers:
        before = model.get_submodule(found.name).weight.detach()
        weights = [r[found.name] for r in results]
        flips, overlaps = [], []
        for one, two in itertools.pairwise(weights):
            if name == "gptq":
                flips.append((~torch.isclose(one, two, rtol=1e-4)).double().mean())
                continue
            gone = {*(one == 0).flatten().nonzero()[:, 0].tolist()}
            also = {*(two == 0).flatten().nonzero()[:, 0].tolist()}
            flips.append(torch.tensor(len(gone ^ also) / one.numel()).double())
            overlaps.append(len(gone & also) / len(gone | also))
        assert found.flip == pytest.approx(float(torch.stack(flips).mean()), abs=3e-3)
        if name == "gptq":
            assert found.jaccard is None
        else:
            assert found.jaccard == pytest.approx(sum(overlaps) / 3, abs=6e-3)
        for number, after in enumerate(weights):
            for column, x in enumerate(judged):
                expected = output_error(x[found.name], before, after)
                assert float(found.errors[number, column]) == pytest.approx(expected, rel=2e-2)
    total = sum(float(x.errors[2, 1]) for x in draws.layers)
    assert float(draws.errors("c")[2]) == pytest.approx(total)


def test_a_draw_becomes_a_set_to_evaluate(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS)
    draws = draw_uncertainty(bank, layers, method_named("wanda"), "b", nsamples=9, draws=3)
    made = draws.calibration(bank, 1)
    assert sum(made.weights or [1] * made.nsamples) == 9
    plain, weighed = compressed("wanda", repeated(POOL, draws.counts[1])), compressed("wanda", made)
    for name, weight in plain.items():
        assert (weight == weighed[name]).double().mean() > 0.999


@pytest.mark.parametrize("name", ["wanda", "gptq"])
def test_sampled_rows_are_those_rows_of_the_whole(name: str, tmp_path: Path) -> None:
    parts = GROUPED if name == "gptq" else PARTS
    model, layers, bank = opened(tmp_path, parts)
    method = method_named(name)
    few = draw_uncertainty(bank, layers, method, "b", nsamples=5, domains=["b"], draws=3, rows=4)
    assert few.rows == 4
    judged = inputs_of(model, JUDGE.sequences)
    by_name = {layer.name: layer for layer in layers}
    weights = bank.spread("b", "choose", few.counts)
    for row in bank.inputs:
        for layer in row.layers:
            found = next(x for x in few.layers if x.name == layer)
            before = by_name[layer].read()
            stride = before.shape[0] / 4
            picked = [int(i * stride) for i in range(4)]
            whole = [
                method.compress(before, bank.statistics(row, method.statistic, w)).weight
                for w in weights
            ]
            errors = [output_error(judged[layer], before[picked], w[picked]) for w in whole]
            torch.testing.assert_close(
                found.errors[:, 0], torch.tensor(errors).double(), rtol=1e-2, atol=1e-6
            )
            if name == "wanda":
                flips = [
                    ((a[picked] == 0) != (b[picked] == 0)).double().mean()
                    for a, b in itertools.pairwise(whole)
                ]
                assert found.flip == pytest.approx(float(sum(flips)) / 2, abs=2e-3)


def test_rows_that_depend_on_each_other_are_never_sampled(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS)
    method = method_named("ria")
    few = draw_uncertainty(bank, layers, method, "b", nsamples=5, draws=3, rows=4)
    whole = draw_uncertainty(bank, layers, method, "b", nsamples=5, draws=3, rows=None)
    assert few.rows is None
    assert few.flip == whole.flip


@pytest.mark.parametrize("name", ["magnitude", "rtn"])
def test_without_data_no_draw_differs(name: str, tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS)
    draws = draw_uncertainty(
        bank, layers, method_named(name), "b", nsamples=4, domains=["b", "c"], draws=7
    )
    assert draws.flip == 0
    assert draws.jaccard == (1 if name == "magnitude" else None)
    assert draws.errors("b").shape == (7,)
    assert draws.relative_spread("b") == draws.relative_spread("c") == 0
    assert float(draws.errors("b")[0]) > 0


def test_a_pool_of_one_has_no_spread(tmp_path: Path) -> None:
    parts = [Part("b", "choose", text("b", [12], 1)), *PARTS[1:]]
    _, layers, bank = opened(tmp_path, parts)
    draws = draw_uncertainty(
        bank, layers, method_named("wanda"), "b", nsamples=3, domains=["b"], draws=5
    )
    assert draws.flip == draws.relative_spread("b") == 0


def test_many_draws_at_a_time_are_those_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_calib_plugin.bank import draws as module
    from lm_calib_plugin.pruning.pipeline import Pipeline

    _, layers, bank = opened(tmp_path, PARTS)

    def run() -> Draws:
        return draw_uncertainty(
            bank, layers, method_of("wanda", pattern="2:4"), "b", nsamples=4, domains=["b"], draws=9
        )

    whole = run()
    monkeypatch.setattr(module, "_ELEMENTS", 4 * 16 * 32)
    some = run()
    monkeypatch.setattr(Pipeline, "elementwise", False)
    single = run()
    for one, two, three in zip(whole.layers, some.layers, single.layers, strict=True):
        assert one.flip == pytest.approx(two.flip) == pytest.approx(three.flip)
        assert one.jaccard == pytest.approx(two.jaccard) == pytest.approx(three.jaccard)
        torch.testing.assert_close(one.errors, two.errors)
        torch.testing.assert_close(one.errors, three.errors)


def test_a_seed_decides_and_nothing_else_is_touched(tmp_path: Path) -> None:
    model, layers, bank = opened(tmp_path, PARTS)
    before, state = state_of(model), torch.get_rng_state()

    def run(seed: int) -> dict:
        found = draw_uncertainty(
            bank, layers, method_named("wanda"), "b", nsamples=4, domains=["c"], draws=6, seed=seed
        ).to_json()
        return {k: v for k, v in found.items() if k != "seconds"}

    first = run(3)
    torch.rand(1)
    assert run(3) == first
    assert run(4) != first
    torch.set_rng_state(state)
    run(3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_summaries_are_the_textbook_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.rand(11, 2, dtype=torch.float64, generator=generator)
    two = torch.rand(11, 2, dtype=torch.float64, generator=generator)
    two[:, 1] = float("nan")  # no output on that domain
    layers = (LayerDraws("x", 0.1, 0.8, one), LayerDraws("y", 0.3, 0.6, two))
    draws = Draws("s", "choose", 4, ("p", "q"), layers, None, torch.ones(11, 5), 0, 1.0)
    sums = [float(a + b) for a, b in zip(one[:, 0], two[:, 0], strict=True)]
    mean = sum(sums) / 11
    sd = (sum((x - mean) ** 2 for x in sums) / 10) ** 0.5
    assert draws.relative_spread("p") == pytest.approx(sd / mean)
    torch.testing.assert_close(draws.errors("q"), one[:, 1])
    for percent, rank in ((0, 0), (10, 1), (50, 5), (90, 9), (100, 10)):
        assert sums[draws.percentile_draw("p", percent)] == sorted(sums)[rank]
    assert (draws.flip, draws.jaccard) == (pytest.approx(0.2), pytest.approx(0.7))
    assert (draws.draws, draws.pool) == (11, 5)


def test_resampling_is_the_bootstrap() -> None:
    counts = resampled(10, 20, 3000, 1)
    assert torch.equal(counts.sum(1), torch.full((3000,), 20.0, dtype=torch.float64))
    # A count is binomial: 20 tries of 1 in 10.
    assert counts.mean() == 2
    assert float(counts.var()) == pytest.approx(20 * 0.1 * 0.9, rel=0.03)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    parts = [*PARTS, Part("a", "choose", text("a", [12] * 4, 5), second_order=False)]
    _, layers, bank = opened(tmp_path, parts)
    with pytest.raises(UserError, match="groups or more.*--groups 16"):
        draw_uncertainty(bank, layers, method_named("gptq"), "b", nsamples=4)
    with pytest.raises(UserError, match="has no Gram matrices"):
        draw_uncertainty(bank, layers, method_named("gptq"), "a", nsamples=4)
    draw_uncertainty(bank, layers, method_named("wanda"), "a", nsamples=4, draws=2)
    with pytest.raises(UserError, match="it holds: b \\(choose\\)"):
        draw_uncertainty(bank, layers, method_named("wanda"), "z", nsamples=4)
    for wrong in ({"draws": 1}, {"nsamples": 0}, {"rows": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            draw_uncertainty(bank, layers, method_named("wanda"), "b", **{"nsamples": 4, **wrong})
    from dataclasses import replace

    stranger = replace(layers[0], name="model.layers.9.mlp")
    with pytest.raises(UserError, match=r"does not hold model\.layers\.9\.mlp"):
        draw_uncertainty(bank, [*layers, stranger], method_named("wanda"), "b", nsamples=4)
