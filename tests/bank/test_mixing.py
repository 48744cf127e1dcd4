"""The shares that are found, against a search of the whole simplex."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lm_calib_plugin.bank import Bank, Part
from lm_calib_plugin.bank.errors import layer_errors
from lm_calib_plugin.bank.mixing import DAMPS, FLOOR, ROUNDS, Objective, _floored, search_mix
from lm_calib_plugin.errors import UserError
from tests.bank.tools import opened, state_of, text
from tests.methods import method_of

METHOD = method_of("wanda", sparsity=0.5)


def parts(names: str, count: int = 10) -> list[Part]:
    folds = ("choose", "validate")
    return [
        Part(name, fold, text(name, [24] * count, 10 * i + j))
        for i, name in enumerate(names)
        for j, fold in enumerate(folds)
    ]


def values(
    bank: Bank, layers: list, method: object, names: str, mixes: list[list[float]]
) -> list[list[float]]:
    """Return log regrets by brute force: median over layers of the log ratio of errors."""
    judges = {n: bank.mixture({n: 1.0}, "validate") for n in names}
    methods = {
        str(i): (method, bank.mixture(dict(zip(names, mix, strict=True)), "choose"))
        for i, mix in enumerate(mixes)
    }
    methods |= {n: (method, bank.mixture({n: 1.0}, "choose")) for n in names}
    errors = layer_errors(bank, layers, methods, judges)
    found = []
    for i in range(len(mixes)):
        row = []
        for column, name in enumerate(names):
            logs = sorted(
                math.log(e / o)
                for e, o in zip(
                    errors[str(i)][:, column].tolist(),
                    errors[name][:, column].tolist(),
                    strict=True,
                )
            )
            row.append(logs[(len(logs) - 1) // 2])
        found.append(row)
    return found


def simplex(size: int, step: float = 0.05) -> Iterator[list[float]]:
    count = round(1 / step)
    for picked in itertools.product(range(count + 1), repeat=size - 1):
        if sum(picked) <= count:
            yield [p * step for p in picked] + [1 - sum(picked) * step]


def worth(objective: Objective, regrets: list[float], names: str) -> float:
    """Write the objectives out once more."""
    if objective.kind == "minimax":
        return max(regrets)
    if objective.kind == "weighted":
        shares = [objective.traffic[n] for n in names]
        return sum(s * r for s, r in zip(shares, regrets, strict=True)) / sum(shares)
    over = sum(max(0.0, r - math.log(objective.limit)) for r in regrets)
    return sum(regrets) / len(regrets) + 10 * over


@pytest.mark.parametrize("names", ["ac", "abc"])
def test_the_found_mix_is_as_good_as_the_best_of_a_grid(names: str, tmp_path: Path) -> None:
    model, layers, bank = opened(tmp_path, parts(names))
    before, state = state_of(model), torch.get_rng_state()
    grid = list(simplex(len(names)))
    table = values(bank, layers, METHOD, names, grid)
    for objective in (
        Objective("minimax"),
        Objective("weighted", {"a": 4, "b": 1, "c": 1}),
        Objective("no_worse", limit=1.3),
    ):
        mix = search_mix(bank, layers, METHOD, list(names), objective, rows=None)
        shares = list(mix.shares.values())
        assert list(mix.shares) == list(names)
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert min(shares) >= FLOOR - 1e-6
        (regrets,) = values(bank, layers, METHOD, names, [shares])
        assert list(mix.regrets.values()) == pytest.approx([math.exp(r) for r in regrets], rel=2e-2)
        reached = worth(objective, regrets, names)
        assert mix.objective == pytest.approx(reached, abs=2e-2)
        best = min(worth(objective, row, names) for row in table)
        assert mix.objective <= best + 0.03
        middle = [1 / len(names)] * len(names)
        (uniform,) = values(bank, layers, METHOD, names, [middle])
        assert mix.objective <= worth(objective, uniform, names) + 1e-6
        assert len(mix.history) == ROUNDS
        assert mix.history[0]["shares"] == pytest.approx(dict(zip(names, middle, strict=True)))
        assert mix.damp is None
        assert json.loads(json.dumps(mix.to_json(), allow_nan=False))["shares"] == mix.shares
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_equal_searches_find_equal_mixes(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, parts("ac", 4))
    first = search_mix(bank, layers, METHOD, ["a", "c"])
    torch.rand(1)
    assert search_mix(Bank.open(bank.folder), layers, METHOD, ["a", "c"]) == first


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_layers_are_searched_too(count: int, tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, parts("ac", 4))
    mix = search_mix(bank, layers[-count:], METHOD, ["a", "c"])
    assert all(math.isfinite(r) for r in mix.regrets.values())


def test_one_source_is_all_of_it(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, parts("a", 4))
    mix = search_mix(bank, layers, METHOD, ["a"])
    assert mix.shares == {"a": 1}
    assert mix.regrets == {"a": 1}
    assert mix.history == ()


def test_the_ridge_is_the_best_of_all(tmp_path: Path) -> None:
    # One input, so that what is searched is the whole.
    _, layers, bank = opened(tmp_path, parts("ac", 3))
    layers = [x for x in layers if x.name == "model.layers.1.mlp.down_proj"]
    method = method_of("gptq", bits=3, group_size=8, damp=0.05)
    mix = search_mix(bank, layers, method, ["a", "c"], search_damp=True, rows=None)
    weights = bank.mixture(mix.shares, "choose")
    judges = {n: bank.mixture({n: 1.0}, "validate") for n in "ac"}
    own = {
        n: float(
            layer_errors(
                bank, layers, {"own": (method, bank.mixture({n: 1.0}, "choose"))}, {n: judges[n]}
            )["own"]
        )
        for n in "ac"
    }
    reached = {}
    for damp in (*DAMPS, 0.05):
        other = method_of("gptq", bits=3, group_size=8, damp=damp)
        errors = layer_errors(bank, layers, {"m": (other, weights)}, judges)["m"][0].tolist()
        reached[damp] = max(math.log(e / o) for e, o in zip(errors, own.values(), strict=True))
    best = min(reached.values())
    assert reached[mix.damp] == pytest.approx(best, abs=5e-3)
    # Regrets refer to what a domain reaches by itself with the ridge that was given.
    assert max(math.log(r) for r in mix.regrets.values()) == pytest.approx(best, abs=5e-3)
    plain = search_mix(bank, layers, METHOD, ["a", "c"], search_damp=True)
    assert plain.damp is None


def test_no_share_is_below_the_floor() -> None:
    for shares in ([1.0, 0.0], [0.99, 0.005, 0.005], [0.3, 0.3, 0.4], [5.0, 1.0]):
        found = _floored(torch.tensor(shares, dtype=torch.float64))
        assert float(found.sum()) == pytest.approx(1)
        assert float(found.min()) >= FLOOR - 1e-12
    kept = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    torch.testing.assert_close(_floored(kept), kept)
    many = _floored(torch.rand(80, dtype=torch.float64, generator=torch.Generator()))
    torch.testing.assert_close(many, torch.full((80,), 1 / 80, dtype=torch.float64))


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, parts("ac", 2))
    for wrong, message in (
        ({"kind": "minmax"}, "did you mean `minimax`"),
        ({"kind": "weighted", "traffic": {"a": -1.0}}, "traffic"),
        ({"kind": "weighted", "traffic": {"a": 0.0}}, "not all of them 0"),
        ({"kind": "no_worse", "limit": 0.0}, "limit"),
    ):
        with pytest.raises(UserError, match=message):
            Objective(**wrong)
    with pytest.raises(UserError, match="no share of c"):
        search_mix(bank, layers, METHOD, ["a", "c"], Objective("weighted", {"a": 1.0}))
    for sources in ([], ["a", "a"]):
        with pytest.raises(UserError, match="each once"):
            search_mix(bank, layers, METHOD, sources)
    with pytest.raises(UserError, match="no weight is changed"):
        search_mix(bank, layers, method_of("wanda", sparsity=0), ["a", "c"])
    with pytest.raises(UserError, match="no `z`"):
        search_mix(bank, layers, METHOD, ["a", "z"])
