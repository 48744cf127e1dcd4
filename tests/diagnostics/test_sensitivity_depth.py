"""Rankings of blocks: those of the engine's own runs, and of models with parts taken out."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from lm_calib_plugin import Recipe, compress, engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.diagnostics.sensitivity import DepthResult, Ranking, probe_depth
from lm_calib_plugin.diagnostics.sensitivity.depth import kendall
from lm_calib_plugin.diagnostics.sensitivity.depth_shown import depth_findings, depth_section
from lm_calib_plugin.errors import UserError
from tests.diagnostics.sensitive import QUIET, assert_same, calibration, state
from tests.tiny import make_model, random_ids

LENGTHS = [16, 9, 16, 5, 12]


def mixed(weights: list[float] | None = None) -> CalibrationSet:
    return CalibrationSet.of(random_ids(LENGTHS), seqlen=16, weights=weights)


@pytest.mark.parametrize("unit", ["block", "attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_rankings_are_those_of_the_engine(name: str, unit: str) -> None:
    model = make_model(name)
    before = state(model)
    found = probe_depth(model, [("text", 0, mixed())], unit=unit, progress=False)
    assert_same(before, model)
    for ranking in found.rankings:
        if ranking.metric == "logit":
            continue
        recipe = Recipe(method=f"depth_{ranking.metric}", blocks=1, sublayer=unit, heldout=0)
        other = copy.deepcopy(model)
        report = compress(other, None, recipe, QUIET, mixed())
        rows = report.structure["ranking"]
        assert [row["name"] for row in rows] == found.parts
        values = [row["value"] for row in rows]
        assert list(ranking.values) == pytest.approx(values, rel=1e-4, abs=1e-6)
        removed = [row["name"] for row in rows if row["removed"]]
        assert removed == [found.parts[ranking.order[0]]]


class Nothing(nn.Module):
    """A block that hands on what it gets."""

    def forward(self, hidden: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0, 3.0, 1.0]])
def test_logits_are_those_of_models_without_a_block(weights: list[float] | None) -> None:
    model = make_model()
    found = probe_depth(
        model, [("text", 0, mixed(weights))], metrics=("logit", "loss"), progress=False
    )
    logit, loss = found.rankings
    for index in range(3):
        other = copy.deepcopy(model)
        other.model.layers[index] = Nothing()
        moved = rise = rows = targets = 0.0
        for weight, ids in zip(weights or [1.0] * 5, random_ids(LENGTHS), strict=True):
            with torch.no_grad():
                whole, without = (m(ids[None], labels=ids[None]) for m in (model, other))
            gap = (whole.logits - without.logits)[0].norm(dim=-1)
            moved, rows = moved + weight * float(gap.sum()), rows + weight * len(ids)
            targets += weight * (len(ids) - 1)
            rise += weight * (len(ids) - 1) * float(without.loss - whole.loss)
        assert logit.values[index] == pytest.approx(moved / rows, rel=1e-4)
        assert loss.values[index] == pytest.approx(rise / targets, rel=1e-3, abs=1e-6)


def test_a_planted_block_that_does_nothing_goes_first() -> None:
    model = make_model()
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    found = probe_depth(model, [("text", 0, calibration())], progress=False)
    for ranking in found.rankings:
        assert ranking.values[1] == pytest.approx(0, abs=1e-6)
        if ranking.metric != "loss":  # of random weights a block may do harm
            assert ranking.order[0] == 1
    assert "1, " in depth_findings(found)[0]


def hand_tau(first: list[float], second: list[float]) -> float:
    """Kendall's tau-b by its definition, over all pairs."""
    plus = minus = ties_first = ties_second = 0
    for i, j in itertools.combinations(range(len(first)), 2):
        a, b = first[i] - first[j], second[i] - second[j]
        plus += a * b > 0
        minus += a * b < 0
        ties_first += a == 0
        ties_second += b == 0
    pairs = len(first) * (len(first) - 1) / 2
    return (plus - minus) / math.sqrt((pairs - ties_first) * (pairs - ties_second))


def test_tau_by_hand() -> None:
    assert kendall([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    for first, second in (([1, 1, 2, 5], [3, 1, 1, 2]), ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])):
        assert kendall(first, second) == pytest.approx(hand_tau(first, second))
    assert math.isnan(kendall([1, 1, 1], [1, 2, 3]))


def result(*rankings: tuple[str, str, int, tuple[float, ...]]) -> DepthResult:
    found = [Ranking(*ranking) for ranking in rankings]
    return DepthResult("block", [f"b.{i}" for i in range(len(found[0].values))], found)


def test_ranks_and_agreement_are_told() -> None:
    up, swapped, down = (1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 2.0, 4.0), (4.0, 3.0, 2.0, 1.0)
    found = result(
        ("cosine", "c4", 0, up),
        ("loss", "c4", 0, down),
        ("cosine", "code", 0, swapped),
        ("loss", "code", 0, down),
        ("cosine", "c4", 1, up),
    )
    assert found.rankings[1].ranks == [4, 3, 2, 1]
    assert found.rankings[2].order == [0, 2, 1, 3]
    told = " ".join(depth_findings(found))
    assert "0, 1, 2 by cosine; 3, 2, 1 by loss" in told
    assert "metrics disagree: cosine and loss are least alike (tau -1.00)" in told
    assert "rankings on c4 and on code: by cosine agree in part (tau 0.67), by loss agree" in told
    assert "rankings on two draws of c4: by cosine agree (tau 1.00)" in told
    assert "by cosine they differ more than draws of one text do" in told
    section = depth_section(found)
    assert section.tables[0].rows[0][1] == "1 (1)"
    assert "leak" in section.sentences[0]
    tau = found.plain()["tau"]
    assert tau[0][1] == -1
    assert tau[0][2] == pytest.approx(hand_tau(list(up), list(swapped)))


def test_ties_go_by_place() -> None:
    assert Ranking("l1", "t", 0, (2.0, 1.0, 1.0)).order == [1, 2, 0]


def test_one_block_ranks_nothing() -> None:
    with pytest.raises(UserError, match="has one block"):
        probe_depth(make_model(num_hidden_layers=1), [("t", 0, calibration())])


def test_experts_are_ranked_too() -> None:
    model = make_model("qwen3_moe")
    found = probe_depth(model, [("t", 0, calibration())], unit="mlp", progress=False)
    blocks = engine.find_blocks(model)
    assert found.parts == [f"{blocks.path}.{i}.mlp" for i in range(3)]
    assert len(found.rankings) == 5
