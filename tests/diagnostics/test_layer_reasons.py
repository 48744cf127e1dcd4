"""Planted causes are found and named, and are not where they were not planted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin.diagnostics.layers import reasons
from lm_calib_plugin.diagnostics.layers.evidence import Layer, Weights, basis_of
from lm_calib_plugin.diagnostics.layers.findings import findings
from lm_calib_plugin.diagnostics.layers.measuring import InputSeen, Measured
from lm_calib_plugin.diagnostics.layers.reasons import Case
from lm_calib_plugin.diagnostics.layers.sections import document
from lm_calib_plugin.report import LayerRow
from tests.diagnostics.layer_runs import examined, results_file, saved, why, words
from tests.tiny import make_model

Q = "model.layers.1.self_attn.q_proj"


def row(**given: Any) -> LayerRow:
    plain: dict[str, Any] = {
        "name": Q, "shape": (8, 6), "removed": 0.0, "bits": None, "error_calibration": 0.01,
        "error_heldout": 0.01, "damp": None, "tokens": 1000, "seconds": 0.0,
    }  # fmt: skip
    return LayerRow(**{**plain, **given})


def measured(x: torch.Tensor, dense: torch.Tensor, compressed: torch.Tensor) -> Measured:
    found = Measured(Q, InputSeen.of(x))
    found.energy = float((x @ dense.T).square().sum())
    found.weights = float((x @ (compressed - dense).T).square().sum())
    return found


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_case(**given: Any) -> Case:
    dense, x = numbers(8, 6), numbers(50, 6, seed=1)
    other = dense + 0.01 * numbers(8, 6, seed=2)
    layer = Layer(row(**given), measured(x, dense, other), measured(x, dense, other))
    return Case(layer, Weights(dense, other))


def test_an_ordinary_layer_has_no_reason() -> None:
    assert reasons.reasons(plain_case()) == []
    assert reasons.in_words([]) == "no single reason found"


@pytest.mark.parametrize(
    ("given", "rule", "must"),
    [
        ({"tokens": 0}, "few tokens", "no calibration token"),
        ({"tokens": 5}, "few tokens", "5 calibration tokens for 6 inputs"),
        ({"tokens": 8, "borrowed": 4}, "few tokens", "8 tokens for 6 inputs and borrowed 4"),
        ({"error_heldout": 0.021, "tokens": 40, "damp": 1e-6}, "over-fitted", "2.1 times"),
        ({"fallback": "rtn"}, "fallback", "fell back to rtn"),
        ({"removed": 0.7}, "strength", "70% of it was removed, of others 50%"),
        ({"damp": 0.1}, "ill-conditioned", "0.1 instead of 0.01"),
        ({"input_limit": 9.0, "input_limit_rest": 3.0}, "static range", "without them it were 3"),
        ({"bits": 3, "clipped": 0.02}, "coarse grid", "2.0% of the weights lie beyond"),
        ({"bits": 2, "scale_median": 1.5}, "coarse grid", "a step of its 2-bit grid is 1."),
    ],
)
def test_rules_of_the_report(given: dict[str, Any], rule: str, must: str) -> None:
    case = plain_case(**given)
    found = reasons.reasons(Case(case.layer, case.weights, 0.01, 0.5, None))
    assert [reason.rule for reason in found] == [rule]
    assert must in found[0].words


def test_over_fitting_needs_twice_the_error_and_enough_of_it() -> None:
    for ratio, error, expected in ((1.9, 0.01, False), (2.1, 0.01, True), (9.0, 1e-5, False)):
        layer = Layer(row(error_calibration=error, error_heldout=ratio * error))
        assert (reasons.over_fitted(layer) is not None) == expected


def test_one_weight_that_stretches_the_grid_of_its_row() -> None:
    dense = numbers(40, 64)
    dense[5, 9] = 100 * dense[5].abs().mean()
    step = dense.abs().amax(1, keepdim=True) / 7.5
    x = numbers(200, 64, seed=1)
    x[:, 9] *= 0.01  # its output is no larger than that of the others
    compressed = (dense / step).round() * step
    layer = Layer(row(shape=(40, 64), bits=4), measured(x, dense, compressed))
    weights = Weights(dense, compressed, -1, 4)
    found = reasons.coarse_grid(Case(layer, weights))
    assert found is not None
    assert re.match(r"one weight of row 5 is \d+ times its neighbors", found.words)
    assert "1 such groups of 40" in found.words
    peaks = weights.peaks()
    others = torch.cat([dense[5, :9], dense[5, 10:]]).double()
    assert float(peaks[5, 0]) == pytest.approx(float(dense[5, 9] / others.square().mean().sqrt()))
    # Groups of their own keep the damage in one of them.
    grouped = Weights(dense, compressed, 16, 4)
    assert grouped.peaks().shape == (40, 4)
    assert int((grouped.peaks() >= reasons.PEAK).sum()) == 1


def test_columns_that_calibration_never_showed() -> None:
    dense, x = numbers(8, 6), numbers(50, 6, seed=1)
    compressed = dense.clone()
    compressed[:, 2] = 0
    before = x.clone()
    before[:, 2] = 0
    layer = Layer(row(), measured(x, dense, compressed), measured(before, dense, compressed))
    found = reasons.dead_columns(Case(layer, Weights(dense, compressed)))
    assert found is not None
    assert found.words.startswith("input channel 2, never or hardly active on calibration")
    assert "100% of the error" in found.words
    # Where calibration showed it, it is a column without weights.
    layer = Layer(row(), measured(x, dense, compressed), measured(x, dense, compressed))
    found = reasons.dead_columns(Case(layer, Weights(dense, compressed)))
    assert found is not None
    assert found.words.startswith("input channel 2 lost all weights")


def test_shares_of_channels_and_groups_equal_brute_force() -> None:
    dense, other, x = numbers(4, 6).double(), numbers(4, 6, seed=1), numbers(9, 6, seed=2).double()
    weights, square = Weights(dense.float(), other, 3), x.square().mean(0)
    change = other.double() - dense.float().double()
    by_input = [float((x[:, j].square().mean()) * change[:, j].square().sum()) for j in range(6)]
    assert weights.error_by_input(square).tolist() == pytest.approx(by_input)
    for out in range(4):
        for group in range(2):
            own = range(3 * group, 3 * group + 3)
            expected = sum(float(square[j] * change[out, j] ** 2) for j in own)
            assert float(weights.error_by_group(square)[out, group]) == pytest.approx(expected)


def test_errors_are_compared_on_what_most_are_known_on() -> None:
    x, w = numbers(50, 6), numbers(8, 6)
    one = measured(x, w, 1.1 * w)
    both = [Layer(row(), one), Layer(row())]
    assert basis_of(both) == "heldout"
    assert basis_of(both[:1]) == "text"
    assert basis_of([Layer(row(error_heldout=None))]) == "calibration"


def test_a_planted_outlier_channel(tmp_path: Path) -> None:
    """One gain of a norm 60 times, what reads it as much smaller: the model is the same."""
    model = make_model()
    with torch.no_grad():
        block = model.model.layers[1]
        block.input_layernorm.weight[17] *= 60
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight[:, 17] /= 60
    text = words(tmp_path / "a.jsonl")
    file, _ = results_file(
        tmp_path, saved(tmp_path / "m", model), method="rtn", scheme="W8A8_static",
        calibration=text, nsamples=8, seqlen=32,
    )  # fmt: skip
    found = examined(file)
    assert {layer.name for layer, _ in found.worst[:3]} == {
        f"model.layers.1.self_attn.{n}_proj" for n in "qkv"
    }
    said = why(found, Q)["outlier channel"]
    assert said.startswith("input channel 17 is ")
    assert re.search(r"rounding the inputs makes \d+% of the error", said)
    assert any("input channel 17" in one for one in findings(found))
    assert any(one.startswith("Rounding the inputs makes most of it") for one in findings(found))
    clean = [layer for layer, own in found.worst for r in own if r.rule == "outlier channel"]
    assert {layer.block for layer in clean} == {1}


def test_a_planted_outlier_weight(tmp_path: Path) -> None:
    """Weights 100 times as large on a channel that is as much smaller stretch every grid."""
    model = make_model()
    with torch.no_grad():
        block = model.model.layers[1]
        block.input_layernorm.weight[7] /= 100
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(block.self_attn, name).weight[:, 7] *= 100
    file, _ = results_file(
        tmp_path, saved(tmp_path / "m", model), method="rtn", bits=4, group_size=-1
    )
    found = examined(file, words(tmp_path / "a.jsonl"))
    assert {layer.name for layer, _ in found.worst[:3]} == {
        f"model.layers.1.self_attn.{n}_proj" for n in "qkv"
    }
    assert re.match(r"one weight of row \d+ is \d+ times", why(found, Q)["coarse grid"])
    stretched = {x.name for x, own in found.worst for r in own if "stretches" in r.words}
    assert stretched == {f"model.layers.1.self_attn.{n}_proj" for n in "qkv"}


@pytest.mark.parametrize(("method", "many"), [("gptq", 250), ("sparsegpt", 250)])
def test_a_planted_over_fit(tmp_path: Path, method: str, many: int) -> None:
    """40 tokens for 48 inputs and no ridge: good on these tokens, and nowhere else."""
    folder, text = saved(tmp_path / "m", make_model()), words(tmp_path / "a.jsonl")
    given: dict[str, Any] = {"method": method, "damp": 1e-6, "calibration": text, "seqlen": 20}
    given |= {"bits": 2, "group_size": -1} if method == "gptq" else {"sparsity": 0.6}
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few, _ = results_file(tmp_path / "few", folder, nsamples=4, heldout=0.5, **given)
    found = examined(few)
    over = {layer.name for layer, _, _ in found.over_fitted}
    planted = [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert set(planted) <= over
    assert any(one.startswith("Over-fitted to the calibration set") for one in findings(found))
    for name in planted:
        reason = reasons.over_fit(Case(next(x for x in found.layers if x.name == name)))
        assert reason is not None
        assert "(40 tokens for 48 inputs), with a ridge of only 1e-06" in reason.words
    enough, _ = results_file(tmp_path / "many", folder, nsamples=many, **given)
    found = examined(enough)
    assert found.over_fitted == []
    assert any(one.startswith("No layer is over-fitted") for one in findings(found))


def test_a_planted_dead_expert(tmp_path: Path) -> None:
    """Routers with rows a, -a, b, -b and 0 choose two of the first four, whatever comes in."""
    model = make_model("qwen3_moe", num_experts=5)
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0
    text = words(tmp_path / "a.jsonl")
    file, report = results_file(
        tmp_path, saved(tmp_path / "m", model), method="gptq", bits=4, group_size=-1,
        calibration=text, nsamples=60, seqlen=32,
    )  # fmt: skip
    dead = {r.name for r in report.layers if r.tokens == 0}
    names = {f"model.layers.1.mlp.experts.4.{part}_proj" for part in ("gate_up", "down")}
    assert names <= dead
    found = examined(file)
    assert {x.name for x in found.starved if x.row.tokens == 0} == dead
    said = next(one for one in findings(found) if one.startswith("No calibration token reaches"))
    assert all(name in said for name in names)
    assert "none of the text does either" in said
    shown = document(found)
    assert said in shown.text()
    assert "model.layers.1.mlp.experts.4.down_proj" in shown.html()
