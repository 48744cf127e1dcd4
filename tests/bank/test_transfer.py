"""Held-out errors, regrets and verdicts, against the raw inputs of the judged sequences."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lm_calib_plugin.bank import Part
from lm_calib_plugin.bank import transfer as module
from lm_calib_plugin.bank.errors import layer_errors, layers_by_input
from lm_calib_plugin.bank.packed import pack, unpack
from lm_calib_plugin.bank.transfer import Entry, Transfer, baseline_of, transfer
from lm_calib_plugin.errors import UserError
from tests.bank.tools import inputs_of, opened, output_error, state_of, text
from tests.methods import method_of

PARTS = [
    Part("a", "choose", text("a", [12] * 6, 1)),
    Part("a", "judge", text("a", [12, 9, 12], 2)),
    Part("c", "choose", text("c", [12] * 6, 3)),
    Part("c", "judge", text("c", [12, 7], 4)),
]
METHODS = [
    method_of("wanda", sparsity=0.5),
    method_of("sparsegpt", sparsity=0.5),
    method_of("gptq", bits=3, group_size=8),
]


def mixed(bank: object) -> torch.Tensor:
    weights: torch.Tensor = bank.mixture({"a": 0.75, "c": 0.25}, "choose")  # type: ignore[attr-defined]
    return weights


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("targets", [None, ("*down_proj", "*q_proj")])
def test_errors_are_those_of_the_outputs(method: object, targets: object, tmp_path: Path) -> None:
    model, layers, bank = opened(tmp_path, PARTS)
    if targets:  # fewer layers than the bank holds, in another order
        ends = [t.strip("*") for t in targets]
        layers = [x for x in reversed(layers) if x.name.endswith(tuple(ends))]
    before = state_of(model)
    sets = {"mix": mixed(bank), "only c": bank.mixture({"c": 1.0}, "choose")}
    found = transfer(bank, layers, method, sets, ["a", "c"])
    judges = {"a": PARTS[1].calibration, "c": PARTS[3].calibration}
    own = {d: bank.mixture({d: 1.0}, "choose") for d in judges}
    baseline = baseline_of(method)
    for domain, judge in judges.items():
        x = inputs_of(model, judge.sequences)
        for name, weights in sets.items():
            errors, best, without = {}, {}, {}
            for row in bank.inputs:
                for layer in layers:
                    if layer.name not in row.layers:
                        continue
                    w = layer.read()

                    def error(result: object, w: object = w, seen: object = x[layer.name]) -> float:
                        return output_error(seen, w, result.weight)

                    def solved(weights: object, w: object = w, row: object = row) -> object:
                        kind = method.statistic
                        return method.compress(w, bank.statistics(row, kind, weights))

                    errors[layer.name] = error(solved(weights))
                    best[layer.name] = error(solved(own[domain]))
                    without[layer.name] = error(baseline.compress(w, None))
            ratios = {n: errors[n] / without[n] for n in errors}
            entry = found.at(name, domain)
            assert entry.error == pytest.approx(sum(errors.values()), rel=1e-3)
            expected = sum(errors.values()) / sum(best.values())
            assert entry.regret == pytest.approx(expected, rel=1e-3)
            median = statistics.median_low(ratios.values())
            assert entry.against_no_data == pytest.approx(median, rel=1e-3)
            assert entry.worst == pytest.approx(max(ratios.values()), rel=1e-3)
            assert ratios[entry.worst_layer] == pytest.approx(entry.worst, rel=1e-3)
    assert found.at("only c", "c").regret == 1  # its own text
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_method_without_data_is_its_own_baseline(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS)
    for method in (method_of("magnitude", sparsity=0.5), method_of("rtn", bits=3, group_size=8)):
        found = transfer(bank, layers, method, {"mix": mixed(bank)}, ["a"])
        entry = found.at("mix", "a")
        assert (entry.regret, entry.against_no_data, entry.worst) == (1, 1, 1)
        assert entry.own_against_no_data == 1
        assert type(baseline_of(method)) is type(method)


def test_the_baseline_keeps_strength_and_pattern() -> None:
    assert baseline_of(method_of("wanda", pattern="2:4")) == method_of("magnitude", pattern="2:4")
    found = baseline_of(method_of("gptq", bits=2, group_size=16, symmetric=False, damp=1.0))
    assert found == method_of("rtn", bits=2, group_size=16, symmetric=False)


def entry(name: str, domain: str, regret: float, median: float, worst: float) -> Entry:
    return Entry(name, domain, 1.0, regret, median, worst, "model.layers.0.x")


@pytest.mark.parametrize(
    ("median", "worst", "good"),
    [(0.89, 10.0, True), (0.9, 1.0, False), (0.5, 10.01, False), (0.2, 0.9, True)],
)
def test_the_verdict_follows_the_thresholds(median: float, worst: float, good: bool) -> None:
    assert entry("s", "d", 1.0, median, worst).transfers is good


def test_far_from_the_own_text_does_not_transfer() -> None:
    assert entry("s", "d", 1.19, 0.5, 1.0).transfers
    assert not entry("s", "d", 1.2, 0.5, 1.0).transfers


def test_where_own_text_is_of_no_use_by_t_regret_decides() -> None:
    near, far = (
        Entry("s", "d", 1.0, regret, 1.3, 2.0, "x", own_against_no_data=1.1)
        for regret in (1.05, 1.4)
    )
    assert near.transfers
    assert not far.transfers


def test_advice_is_the_set_whose_worst_domain_is_best() -> None:
    entries = (
        entry("x", "p", 1.0, 0.5, 1.0),
        entry("x", "q", 1.9, 0.95, 1.0),
        entry("y", "p", 1.1, 0.5, 1.0),
        entry("y", "q", 1.05, 0.5, 30.0),
    )
    found = Transfer("Wanda", "Magnitude", entries)
    assert (found.sets, found.domains) == (["x", "y"], ["p", "q"])
    assert found.worst_regret("x").domain == "q"
    assert found.advice() == (
        "use `y`: at worst 1.10 times the error of a domain's own text (p); "
        "`x` does not transfer to q; `y` does not transfer to q"
    )
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [e["transfers"] for e in plain["entries"]] == [True, False, True, False]
    assert plain["entries"][1]["regret"] == 1.9
    assert plain["thresholds"] == {
        "median": module.NO_USE,
        "regret": module.FAR,
        "layer": module.BROKEN,
    }
    assert plain["advice"] == found.advice()


@pytest.mark.parametrize(
    ("bad", "advice"),
    [
        ([], "use `x`: at worst 1.15 times the error of a domain's own text (q)"),
        (
            [("y", "p"), ("y", "q"), ("y", "r"), ("x", "q"), ("x", "r")],
            "use `x`: at worst 1.15 times the error of a domain's own text (q); "
            "`x` does not transfer to q, r; `y` does not transfer to any domain",
        ),
        (
            [("x", "r")],
            "use `y`: at worst 1.19 times the error of a domain's own text (r); "
            "`x` does not transfer to r",
        ),
        (
            [("x", "p"), ("x", "q"), ("x", "r"), ("y", "q")],
            "use `y`: at worst 1.19 times the error of a domain's own text (r); "
            "`x` does not transfer to any domain; `y` does not transfer to q",
        ),
        (
            [(s, d) for s in "xy" for d in "pqr"],
            "no set transfers to any domain: use magnitude, which needs no data, or text that is "
            "nearer to the domains",
        ),
    ],
)
def test_advice_groups_by_set(bad: list[tuple[str, str]], advice: str) -> None:
    regrets = {"x": (1.0, 1.15, 1.1), "y": (1.17, 1.16, 1.19)}
    entries = tuple(
        entry(name, domain, regret, 0.95 if (name, domain) in bad else 0.5, 1.0)
        for name, row in regrets.items()
        for domain, regret in zip("pqr", row, strict=True)
    )
    assert Transfer("Wanda", "Magnitude", entries).advice() == advice


def test_advice_about_one_domain_names_it() -> None:
    entries = (entry("x", "p", 1.0, 0.5, 1.0), entry("y", "p", 9.0, 0.95, 1.0))
    assert Transfer("GPTQ", "RTN", entries).advice().endswith("`y` does not transfer to p")
    (last,) = (Transfer("GPTQ", "RTN", entries[1:]).advice(),)
    assert last.startswith("no set transfers to any domain: use rtn")


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS)
    sets = {"mix": mixed(bank)}
    with pytest.raises(UserError, match="no weight is changed"):
        transfer(bank, layers, method_of("wanda", sparsity=0), sets, ["a"])
    with pytest.raises(UserError, match="0 sets"):
        transfer(bank, layers, method_of("wanda", sparsity=0.5), {}, ["a"])
    with pytest.raises(UserError, match="no `z`"):
        transfer(bank, layers, method_of("wanda", sparsity=0.5), sets, ["z"])
    with pytest.raises(UserError, match="does not hold another"):
        transfer(
            bank,
            [replace(layers[0], name="another")],
            method_of("wanda", sparsity=0.5),
            sets,
            ["a"],
        )
    with pytest.raises(UserError, match="no layer at all"):
        transfer(bank, [], method_of("wanda", sparsity=0.5), sets, ["a"])
    bank.require_model(bank.header.model)
    with pytest.raises(UserError, match="was built with model"):
        bank.require_model("0" * 64)


def test_parts_of_the_inputs_are_a_partition_with_every_kind(tmp_path: Path) -> None:
    _, layers, bank = opened(tmp_path, PARTS, num_hidden_layers=8)
    whole = [row.name for row, _ in layers_by_input(bank, layers)]
    dealt = [[row.name for row, _ in layers_by_input(bank, layers, (i, 4))] for i in range(4)]
    assert sorted(name for part in dealt for name in part) == sorted(whole)
    for part in dealt:
        assert len(part) == len(whole) / 4
        assert len({name.split(".", 3)[3] for name in part}) == 4
    method = method_of("wanda", sparsity=0.5)
    judges = {"a": bank.mixture({"a": 1.0}, "judge")}
    methods = {"m": (method, mixed(bank))}
    full = layer_errors(bank, layers, methods, judges)["m"]
    some = [layer_errors(bank, layers, methods, judges, share=(i, 4))["m"] for i in range(4)]
    assert sorted(torch.cat(some).flatten().tolist()) == sorted(full.flatten().tolist())


def test_a_domain_without_output_has_no_error() -> None:
    assert Entry("s", "d", 1, 1, float("nan"), 1, "x").transfers is False


def test_matrices_that_were_read_are_not_changed_by_it(tmp_path: Path) -> None:
    _, _, bank = opened(tmp_path, PARTS)
    row = bank.inputs[0]
    first = bank.gram(row, bank.mixture({"a": 1.0}, "judge")).gram().clone()
    for share in (0.5, 2.0):
        bank.gram(row, mixed(bank) * share)
    bank._grams.clear()
    again = bank.gram(row, bank.mixture({"a": 1.0}, "judge"))
    assert torch.equal(again.gram(), first)
    assert bank.gram(row, bank.mixture({"a": 1.0}, "judge")) is again  # remembered
    assert torch.equal(first, first.t())


def test_remembered_matrices_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_calib_plugin.bank import store

    monkeypatch.setattr(store, "REMEMBERED", 3 * 32 * 32 * 4)
    _, _, bank = opened(tmp_path, PARTS)
    for row in bank.inputs:
        bank.gram(row, mixed(bank))
    assert 0 < sum(g.matrix.nbytes for g in bank._grams.values()) <= store.REMEMBERED


@pytest.mark.parametrize("size", [1, 5, 130, 300])
def test_wide_triangles_come_back_too(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_calib_plugin.bank import packed

    x = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    x = x + x.t()
    assert torch.equal(unpack(pack(x), size), x)
    monkeypatch.setattr(packed, "_GATHERED", 0)
    assert torch.equal(unpack(pack(x), size), x)
