"""``bits=auto:B``: the choice against exhaustive search, the trials against one-layer swaps."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lm_calib_plugin import Recipe, compress, engine
from lm_calib_plugin import bit_allocation as module
from lm_calib_plugin.bit_allocation import WIDTHS, Choice, choose_widths
from lm_calib_plugin.errors import UserError
from tests.engine.test_walk import LENGTHS, QUIET, calibration, flat
from tests.quantization.test_gptq import slow_gptq, visiting_order
from tests.tiny import make_model, random_ids


def random_choices(count: int, seed: int, size: float = 1.0) -> list[Choice]:
    """Return layers of several sizes whose errors fall with the width, mostly."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        weights = int(rng.integers(1, 9)) * 64
        scales = int(rng.integers(1, 5)) * 16
        costs = tuple(float(weights * bits + scales) for bits in WIDTHS)
        errors = size * np.sort(rng.random(len(WIDTHS)) * rng.choice([0.01, 1, 30]))[::-1]
        if rng.random() < 0.3:
            errors[3] = errors[0]
        made.append(Choice(f"layer{i}", weights, costs, tuple(map(float, errors))))
    return made


def exhaustive(choices: list[Choice], budget: float) -> float:
    """Return the smallest sum of errors of all combinations within the budget."""
    allowed = budget * sum(c.size for c in choices) * (1 + 1e-12)
    best = float("inf")
    for places in itertools.product(range(len(WIDTHS)), repeat=len(choices)):
        if sum(c.costs[p] for c, p in zip(choices, places, strict=True)) <= allowed:
            best = min(best, sum(c.errors[p] for c, p in zip(choices, places, strict=True)))
    return best


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e4])
@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all(seed: int, size: float) -> None:
    choices = random_choices(4, seed, size)
    for budget in (2.9, 3.25, 4.5, 6.0, 8.5):
        if sum(c.costs[0] for c in choices) > budget * sum(c.size for c in choices):
            continue
        places = choose_widths(choices, budget)
        assert len(places) == 4
        used = sum(c.costs[p] for c, p in zip(choices, places, strict=True))
        assert used <= budget * sum(c.size for c in choices) * (1 + 1e-9)
        reached = sum(c.errors[p] for c, p in zip(choices, places, strict=True))
        assert reached == pytest.approx(exhaustive(choices, budget), rel=1e-6)


def test_errors_of_many_sizes() -> None:
    """A layer with tiny errors still gets its best width when there is room for it."""
    large = Choice("large", 64, tuple(64.0 * b for b in WIDTHS), (9, 7, 5, 3, 2, 1, 0.5))
    small = Choice("small", 64, large.costs, tuple(e * 1e-7 for e in large.errors))
    assert [WIDTHS[p] for p in choose_widths([large, small], 7.5)] == [8, 7]
    assert [WIDTHS[p] for p in choose_widths([large, small], 8)] == [8, 8]


def test_a_budget_that_is_exactly_met() -> None:
    """A whole width for all layers, scales and all, is a budget that is often asked for."""
    size, costs = 4096 * 128, tuple(4096.0 * 128 * b + 4096 * 16 for b in WIDTHS)
    errors = tuple(2.0**-b for b in WIDTHS)
    choices = [Choice(f"l{i}", size, costs, errors) for i in range(5)]
    assert [WIDTHS[p] for p in choose_widths(choices, 4.125)] == [4] * 5
    # Less than that by a hair: one of them has to give way.
    assert sorted(WIDTHS[p] for p in choose_widths(choices, 4.12499)) == [3, 4, 4, 4, 4]
    nearly = choose_widths(choices, 4.125 * (1 - 1e-7))
    used = sum(costs[p] for p in nearly) / (5 * size)
    assert used <= 4.125 * (1 - 1e-7) * (1 + 1e-9)


def test_a_budget_that_nothing_meets() -> None:
    choices = random_choices(3, 0)
    lowest = sum(c.costs[0] for c in choices) / sum(c.size for c in choices)
    with pytest.raises(UserError, match=r"bits.*auto:2.*scales and zero points.*for instance"):
        choose_widths(choices, 2.0)
    assert choose_widths(choices, lowest) == [0, 0, 0]
    with pytest.raises(UserError, match="allowed|auto:B with B >="):
        choose_widths(choices, lowest * (1 - 1e-6))


def test_errors_of_zero() -> None:
    choices = [Choice("a", 8, tuple(8.0 * b for b in WIDTHS), (0.0,) * 7)]
    assert choose_widths(choices, 3.0) in ([0], [1])


# --- through a model --------------------------------------------------------------------------


def auto(monkeypatch: pytest.MonkeyPatch | None = None, **options: Any) -> Any:
    """Return model, report and what the trials found."""
    seen: list[Choice] = []
    if monkeypatch is not None:

        def spy(choices: Any, budget: float) -> list[int]:
            seen.extend(choices)
            return choose_widths(choices, budget)

        monkeypatch.setattr(module, "choose_widths", spy)
    model = make_model()
    report = compress(model, None, Recipe(group_size=8, **options), QUIET, calibration())
    return model, report, seen


def outputs(model: Any, index: int, ids: list[Tensor]) -> list[Tensor]:
    found: list[Tensor] = []

    def take(_m: Any, _a: Any, out: Any) -> None:
        found.append((out if isinstance(out, Tensor) else out[0])[0].double())

    hook = model.model.layers[index].register_forward_hook(take)
    with torch.no_grad():
        for sequence in ids:
            model(input_ids=sequence[None], use_cache=False)
    hook.remove()
    return found


def levels(weight: np.ndarray, bits: int) -> list:
    """Write out the asymmetric levels of every row and column."""
    lines = []
    for row in weight:
        line = []
        for j in range(len(row)):
            part = row[j // 8 * 8 : j // 8 * 8 + 8]
            low, high = min(0.0, part.min()), max(0.0, part.max())
            scale = (high - low) / (2**bits - 1)
            line.append((np.arange(2**bits) - np.round(-low / scale)) * scale)
        lines.append(line)
    return lines


def test_trials_are_swaps_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, choices = auto(monkeypatch, method="gptq", bits="auto:7", symmetric=False)
    ids = random_ids(LENGTHS)
    held = set(engine.heldout_indices(len(ids), 0.1))
    kept, out = ([x for i, x in enumerate(ids) if (i in held) == h] for h in (False, True))
    dense = make_model()
    assert [c.name for c in choices] == [
        layer.name for layer in engine.find_layers(engine.find_blocks(dense))[0]
    ]
    for choice in (choices[0], choices[10], choices[13], choices[20]):
        layer = dense.get_submodule(choice.name)
        index = int(choice.name.split(".")[2])
        rows: list[Tensor] = []
        hook = layer.register_forward_pre_hook(
            lambda _m, args, rows=rows: rows.append(args[0][0].double())
        )
        with torch.no_grad():
            for sequence in kept:
                dense(input_ids=sequence[None], use_cache=False)
        hook.remove()
        weight, x = layer.weight.data.double().numpy(), torch.cat(rows).numpy()
        before = outputs(dense, index, out)
        for place, bits in enumerate(WIDTHS):
            # Of 16 bits for each scale come the 32 of a float32 model, and a zero point.
            size = weight.size
            assert choice.costs[place] == size * bits + size / 8 * (32 + bits)
            if bits not in (2, 4):
                continue
            swapped = copy.deepcopy(dense)
            rounded = slow_gptq(weight, x, visiting_order(x, True), 0.01, levels(weight, bits))
            swapped.get_submodule(choice.name).weight.data = torch.from_numpy(rounded).float()
            errors = [
                (a - b).square().sum(-1) / b.square().sum(-1)
                for a, b in zip(outputs(swapped, index, out), before, strict=True)
            ]
            expected = float(torch.cat(errors).mean())
            assert choice.errors[place] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {"method": "gptq", "damp": "auto"},
        {"method": "gptq_heldout"},
        {"method": "awq"},
        {"method": "autoround", "rounding": "autoround?iters=3"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_the_budget_is_kept_and_runs_repeat(options: dict[str, Any]) -> None:
    for budget in (7, 8.5):
        model, report, _ = auto(bits=f"auto:{budget}", **options)
        assert report.achieved["bits_stored"] <= budget
        # One width more for the smallest layer would be too much, or there is none.
        widths = {row.bits for row in report.layers}
        assert len(widths) > 1
        again, second, _ = auto(bits=f"auto:{budget}", **options)
        assert torch.equal(flat(model), flat(again))
        assert (report.key, report.weights_digest) == (second.key, second.weights_digest)
        assert [r.bits for r in report.layers] == [r.bits for r in second.layers]


def test_more_bits_lower_the_error() -> None:
    found = [auto(method="rtn", bits=f"auto:{b}")[1].error()["heldout"] for b in (6.2, 8, 12)]
    assert found[0]["median"] > found[1]["median"] > found[2]["median"]


def test_trials_leave_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compressed in the end is the dense model, also where the trials failed half way."""
    model, before = make_model(), flat(make_model())
    whole = module._difference
    calls: list[int] = []

    def broken(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 40:
            raise RuntimeError("injected")
        return whole(*arguments)

    monkeypatch.setattr(module, "_difference", broken)
    with pytest.raises(RuntimeError, match="injected"):
        compress(
            model, None, Recipe(method="rtn", bits="auto:7", group_size=8), QUIET, calibration()
        )
    assert torch.equal(flat(model), before)


def test_all_layers_at_one_width_equal_the_plain_method() -> None:
    """With room for eight bits everywhere, it is the method at eight bits."""
    model, _, _ = auto(method="gptq", bits="auto:12")
    plain = make_model()
    compress(plain, None, Recipe(method="gptq", bits=8, group_size=8), QUIET, calibration())
    assert torch.equal(flat(model), flat(plain))


def test_short_memory_between_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that shrink while a layer is tried give the same widths."""
    _, report, _ = auto(method="rtn", bits="auto:7")
    model = make_model()
    victim, calls = model.model.layers[1].mlp, []

    def fail(_m: Any, args: tuple) -> None:
        if args[0].shape[0] > 1:
            calls.append(1)
            if len(calls) > 2:
                raise torch.OutOfMemoryError("injected")

    hook = victim.register_forward_pre_hook(fail)
    recipe = Recipe(method="rtn", bits="auto:7", group_size=8, heldout=0.4)
    short = compress(model, None, recipe, QUIET, calibration())
    hook.remove()
    whole = compress(make_model(), None, recipe, QUIET, calibration())
    assert [r.bits for r in short.layers] == [r.bits for r in whole.layers]
    assert len(report.layers) == 21


def test_overrides_win() -> None:
    overrides = {"*q_proj": {"bits": 8}, "*down_proj": {"bits": 16}}
    model, report, _ = auto(method="rtn", bits="auto:6.5", overrides=overrides)
    rows = {row.name: row for row in report.layers}
    dense = make_model()
    free = []
    for name, row in rows.items():
        if name.endswith("q_proj"):
            assert row.bits == 8
        elif name.endswith("down_proj"):
            assert row.bits is None
            assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight)
        else:
            free.append(row)
    bits = sum(r.stored_bits * r.shape[0] * r.shape[1] for r in free)
    assert bits <= 6.5 * sum(r.shape[0] * r.shape[1] for r in free)


def test_what_cannot_be_is_refused() -> None:
    for options, match in (
        ({"bits": "auto:3"}, "auto:3"),
        ({"bits": "auto:7", "targets": ["lm_head", "*q_proj"]}, "output head"),
    ):
        model, before = make_model(), flat(make_model())
        recipe = Recipe(method="rtn", group_size=8, **options)
        with pytest.raises(UserError, match=match):
            compress(model, None, recipe, QUIET, calibration())
        assert torch.equal(flat(model), before)
    with pytest.raises(UserError, match="bits"):
        Recipe(method="wanda+rtn", sparsity=0.5, bits="auto:4")
