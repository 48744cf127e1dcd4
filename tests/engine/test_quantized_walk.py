"""Quantization of a whole model against plain loops that share nothing with the engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine import solve
from lm_calib_plugin.engine.activations import QUANTIZER, quantizers, remove
from lm_calib_plugin.engine.batches import make_chunks
from lm_calib_plugin.errors import NumericalError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.quantization.activations import ActivationSpec
from lm_calib_plugin.quantization.grids import GridSpec
from lm_calib_plugin.quantization.parts import InputScaling
from lm_calib_plugin.quantization.transforms.awq import AWQ
from lm_calib_plugin.quantization.transforms.smoothquant import SmoothQuant
from lm_calib_plugin.statistics import GramRanges
from tests.engine.test_walk import LENGTHS, QUIET, calibration, flat
from tests.quantization.test_gptq import level_sets, slow_gptq, visiting_order
from tests.tiny import make_model, random_ids

# The distinct inputs of a block, in the order in which they arise.
INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LOCAL = [name for names in INPUTS for name in names]
ALL = [f"model.layers.{i}.{name}" for i in range(3) for name in LOCAL]


def done(recipe: Recipe, name: str = "llama", model: Any = None, runtime: Runtime = QUIET) -> Any:
    """Return the compressed model and its report."""
    model = make_model(name) if model is None else model
    return model, compress(model, None, recipe, runtime, calibration())


def used() -> list[Tensor]:
    """Return the sequences that count, in their order."""
    ids = random_ids(LENGTHS)
    held = set(engine.heldout_indices(len(ids), 0.1))
    return [x for i, x in enumerate(ids) if i not in held]


@contextmanager
def received(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Note what layers receive before anything that rounds it, one sequence after the other."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = []
    for name in names:

        def note(_m: Any, args: tuple, name: str = name) -> None:
            found[name].append(args[0][0].detach().clone())

        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(note, prepend=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def inputs(model: nn.Module, names: Sequence[str], ids: Sequence[Tensor] | None = None) -> dict:
    """Return for each layer its inputs, one ``[tokens, in]`` for each sequence."""
    with received(model, names) as found, torch.no_grad():
        for sequence in used() if ids is None else ids:
            model(input_ids=sequence[None], use_cache=False)
    return found


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.data


# --- weights ----------------------------------------------------------------------------------


def tieless(name: str = "llama", size: int = 8) -> nn.Module:
    """Return a model in which the largest weight of every group is positive.

    The largest one lies half way between two levels; below zero the last bit of a division would
    decide where it goes, above there is no higher level.
    """
    model = make_model(name)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            width = module.weight.shape[1]
            groups = module.weight.data.view(-1, width if size == -1 else size)
            place = groups.abs().argmax(dim=1, keepdim=True)
            groups.scatter_(1, place, groups.gather(1, place).abs())
    return model


def naive_gptq(weight: Tensor, parts: Sequence[Tensor], symmetric: bool = True) -> Tensor:
    w = weight.double().numpy()
    x = torch.cat(list(parts)).double().numpy()
    found = slow_gptq(w, x, visiting_order(x, True), 0.01, level_sets(w, 4, 8, symmetric))
    return torch.from_numpy(found).float()


def naive_model(propagate: str, true_sequential: bool, symmetric: bool) -> nn.Module:
    """Quantize block after block with whole forward passes, one sequence at a time."""
    model, dense = tieless(), tieless()
    for index in range(3):
        names = [f"model.layers.{index}.{name}" for name in LOCAL]
        seen = inputs(dense if propagate == "dense" else model, names)
        for group in INPUTS:
            own = [f"model.layers.{index}.{name}" for name in group]
            if true_sequential:
                seen = inputs(model, own)
            for name in own:
                found = naive_gptq(weight_of(model, name), seen[name], symmetric)
                weight_of(model, name).copy_(found)
    return model


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"true_sequential": True}, {"propagate": "dense"}],
    ids=["compressed", "true_sequential", "dense"],
)
def test_gptq_of_a_model_equals_a_plain_loop(options: dict[str, Any], symmetric: bool) -> None:
    recipe = Recipe(method="gptq", bits=4, group_size=8, symmetric=symmetric, **options)
    model, _ = done(recipe, model=tieless())
    ways = options.get("propagate", "compressed"), "true_sequential" in options
    naive = naive_model(*ways, symmetric)
    for name in ALL:
        mine, other = weight_of(model, name), weight_of(naive, name)
        # One level is more than 1e-4 here.
        assert float((mine - other).abs().max()) < 1e-6, name


def test_the_three_ways_differ() -> None:
    ways = ({}, {"true_sequential": True}, {"propagate": "dense"})
    digests = {
        done(Recipe(method="gptq", bits=4, group_size=8, **way))[1].weights_digest for way in ways
    }
    assert len(digests) == 3


@pytest.mark.parametrize("method", ["rtn", "autoround"])
def test_other_bits_by_name(method: str) -> None:
    """Layers named with 16 bits are not touched, also where a block is rounded as a whole."""
    options = {"rounding": "autoround?iters=5"} if method == "autoround" else {}
    overrides = {"*down_proj": {"bits": 16}, "*q_proj": {"bits": 8}}
    recipe = Recipe(method=method, bits=3, group_size=8, overrides=overrides, **options)
    model, report = done(recipe)
    dense = make_model()
    rows = {row.name: row for row in report.layers}
    assert set(rows) == set(ALL)
    for name in ALL:
        same = torch.equal(weight_of(model, name), weight_of(dense, name))
        assert same == name.endswith("down_proj")
        bits = 8 if name.endswith("q_proj") else 3
        assert rows[name].bits == (None if same else bits)
        assert (rows[name].error_calibration == 0) == same


@pytest.mark.parametrize("method", ["gptq", "gptq_heldout", "awq"])
def test_only_the_layers_named_are_rounded(method: str) -> None:
    """With 16 bits for all others, what the few need to know is still collected."""
    overrides = {"*o_proj": {"bits": 4, "group_size": 8}}
    model, report = done(Recipe(method=method, bits=16, overrides=overrides))
    named = {name for name in ALL if name.endswith("o_proj")}
    assert {row.name for row in report.layers if row.bits == 4} == named
    if method == "awq":
        return
    plain, _ = done(Recipe(method=method, bits=4, group_size=8, targets=["*o_proj"]))
    assert torch.equal(flat(model), flat(plain))


# --- correction -------------------------------------------------------------------------------


def naive_corrected(true_sequential: bool, amount: float) -> nn.Module:
    """Quantize to nearest, after every layer's target was moved by ridge regression."""
    model, dense = make_model(), make_model()
    for index in range(3):
        names = [f"model.layers.{index}.{name}" for name in LOCAL]
        wanted, seen = inputs(dense, names), inputs(model, names)
        for group in INPUTS:
            own = [f"model.layers.{index}.{name}" for name in group]
            if true_sequential:
                seen = inputs(model, own)
            for name in own:
                x, y = (torch.cat(s[name]).double() for s in (seen, wanted))
                w, gram = weight_of(model, name).double(), x.t() @ x
                ridge = torch.diag(0.1 * gram.diagonal())
                shift = torch.linalg.solve(gram + ridge, x.t() @ (y - x))
                target = w + amount * w @ shift.t()
                rounded = naive_gptq(target, seen[name], symmetric=False)
                weight_of(model, name).copy_(rounded)
    return model


@pytest.mark.parametrize("true_sequential", [False, True])
def test_correction_equals_rounding_the_corrected_target(true_sequential: bool) -> None:
    recipe = Recipe(
        method="gptq",
        bits=4,
        group_size=8,
        symmetric=False,
        correction=0.5,
        true_sequential=true_sequential,
    )
    model, _ = done(recipe)
    naive = naive_corrected(true_sequential, 0.5)
    for name in ALL:
        # Scales follow from targets that float32 gives to 1e-6 only.
        torch.testing.assert_close(
            weight_of(model, name), weight_of(naive, name), rtol=1e-4, atol=2e-6
        )


# --- activations ------------------------------------------------------------------------------


def naive_rows(x: np.ndarray, limit: float | None = None) -> np.ndarray:
    """Round every row to 256 integer levels; one after the other."""
    found = np.zeros_like(x)
    for t, row in enumerate(x):
        amax = np.abs(row).max() if limit is None else limit
        if amax == 0:
            continue
        # Multiplied first: half steps stay half steps in float64.
        level = np.clip(np.round(row * 127.5 / amax), -128, 127)
        found[t] = level * amax / 127.5
    return found


def naive_fp8(x: np.ndarray, amax: float) -> np.ndarray:
    """Round to the nearest value of e4m3, written out, ties to the even mantissa."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    table = np.array(values)
    scale = amax / 448.0
    size = np.abs(x) / scale
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    nearer_high = (size - low > high - size) | ((size - low == high - size) & (above % 2 == 0))
    return np.sign(x) * np.where(nearer_high, high, low) * scale


def naive_weight(weight: Tensor, number: str) -> np.ndarray:
    """Round every output row to its own scale, in float64."""
    w = weight.double().numpy()
    found = np.zeros_like(w)
    for i, row in enumerate(w):
        amax = np.abs(row).max()
        if number == "fp8":
            found[i] = naive_fp8(row, amax)
        else:
            found[i] = np.clip(np.round(row * 127.5 / amax), -128, 127) * amax / 127.5
    return found


class Slow(nn.Module):
    """A linear layer that quantizes in float64 loops."""

    def __init__(self, layer: nn.Linear, number: str, limit: float | None = None) -> None:
        super().__init__()
        self.w, self.number, self.limit = naive_weight(layer.weight.data, number), number, limit
        self.bias = None if layer.bias is None else layer.bias.data.double().numpy()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).double().numpy()
        if self.number == "fp8":
            rounded = np.stack([naive_fp8(r, self.limit or np.abs(r).max()) for r in rows])
        else:
            rounded = naive_rows(rows, self.limit)
        out = rounded @ self.w.T
        out = out if self.bias is None else out + self.bias
        return torch.from_numpy(out).to(x.dtype).reshape(*x.shape[:-1], -1)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def logits(model: nn.Module, seed: int = 7) -> Tensor:
    with torch.no_grad():
        found = [
            model(input_ids=x[None], use_cache=False).logits[0] for x in random_ids([16, 9], seed)
        ]
    return torch.cat(found)


def assert_nearly_equal(model: nn.Module, naive: nn.Module, dense: nn.Module) -> None:
    """Logits agree to less than what quantization changes; a level or two may flip by float32."""
    mine, other, before = logits(model), logits(naive), logits(dense)
    change = float((other - before).norm())
    assert change > 0
    assert float((mine - other).norm()) < 0.2 * change


@pytest.mark.parametrize(("scheme", "number"), [("W8A8", "int"), ("FP8", "fp8")])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_dynamic_schemes_equal_a_plain_loop(
    scheme: str, number: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last bit decides about the largest value of a token; float64 has another one.
    levels = ActivationSpec.levels
    monkeypatch.setattr(ActivationSpec, "levels", lambda s, x, d: levels(s, x, d * (1 - 2**-21)))
    targets = [*LOCAL, "lm_head"]
    recipe = Recipe(method="rtn", scheme=scheme, targets=targets)
    model, _ = done(recipe, model=tieless(name, -1))
    naive = tieless(name, -1)
    if name == "qwen2":
        assert naive.model.layers[0].self_attn.q_proj.bias is not None
    for layer in [*ALL, "lm_head"]:
        put(naive, layer, Slow(tieless(name, -1).get_submodule(layer), number))
    for layer in [*ALL, "lm_head"]:
        slow, quick = naive.get_submodule(layer), model.get_submodule(layer)
        torch.testing.assert_close(
            quick.weight.data, torch.from_numpy(slow.w).float(), rtol=1e-6, atol=1e-9
        )
        x = torch.randn(5, quick.in_features, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(quick(x), slow(x), rtol=1e-4, atol=1e-5)
    assert_nearly_equal(model, naive, tieless(name, -1))


def naive_limits(model: nn.Module, targets: Sequence[str], kind: str) -> dict[str, float]:
    """Return the range of every input, by passes in which later blocks do not round yet."""
    found: dict[str, float] = {}
    for index in (0, 1, 2, 3):
        mixed = copy.deepcopy(model)
        for later in [*mixed.model.layers[index:], mixed.lm_head]:
            remove(later)
        place = f"layers.{index}." if index < 3 else "lm_head"
        own = [name for name in targets if place in name]
        for name, parts in (inputs(mixed, own) if own else {}).items():
            sizes = [x[1:] if kind == "later" else x for x in parts]
            ordered = torch.cat([x.abs().double().flatten() for x in sizes]).sort().values
            rank = int(np.ceil(0.99 * len(ordered))) if kind == "percentile" else len(ordered)
            found[name] = float(ordered[rank - 1])
    return found


@pytest.mark.parametrize(
    ("kind", "observer"),
    [
        ("all", "minmax"),
        ("later", "minmax?first=false"),
        ("percentile", "percentile?q=99"),
    ],
)
def test_static_ranges_equal_a_plain_loop(kind: str, observer: str) -> None:
    targets = [*LOCAL, "lm_head"]
    recipe = Recipe(method="rtn", scheme="W8A8_static", observer=observer, targets=targets)
    dense = tieless(size=-1)
    model, report = done(recipe, model=copy.deepcopy(dense))
    wanted = naive_limits(model, [*ALL, "lm_head"], kind)
    installed = quantizers(model)
    assert set(installed) == {*ALL, "lm_head"}
    rows = {row.name: row for row in report.layers}
    for name, limit in wanted.items():
        # The histogram of a percentile has bins no wider than 1/64 of what they hold.
        near = 1 / 64 if kind == "percentile" else 1e-5
        assert float(installed[name].limit) == pytest.approx(limit, rel=near), name
        assert rows[name].input_limit == pytest.approx(limit, rel=near)
    naive = copy.deepcopy(dense)
    for name, limit in wanted.items():
        slow = Slow(dense.get_submodule(name), "int", float(installed[name].limit))
        put(naive, name, slow)
        quick = model.get_submodule(name)
        x = torch.randn(5, quick.in_features, generator=torch.Generator().manual_seed(3)) * limit
        torch.testing.assert_close(quick(x), slow(x), rtol=1e-4, atol=1e-5 * max(1, limit))
    assert_nearly_equal(model, naive, dense)


def test_static_fp8_equals_a_plain_loop() -> None:
    model, _ = done(Recipe(method="rtn", scheme="FP8_static"))
    dense, naive = make_model(), make_model()
    for name, limit in naive_limits(model, ALL, "all").items():
        assert float(quantizers(model)[name].limit) == pytest.approx(limit, rel=1e-5)
        put(naive, name, Slow(dense.get_submodule(name), "fp8", limit))
    assert_nearly_equal(model, naive, dense)


def test_ranges_of_dense_inputs() -> None:
    """With propagate=dense, a block is fed with what the dense model gives, its ranges too."""
    model, _ = done(Recipe(method="rtn", scheme="W8A8_static", propagate="dense"))
    dense = make_model()
    for index in range(3):
        mixed = copy.deepcopy(dense)
        names = [name for name in ALL if f"layers.{index}." in name]
        for name in names:
            weight_of(mixed, name).copy_(weight_of(model, name))
        for name, parts in inputs(mixed, names).items():
            limit = float(torch.cat(parts).abs().max())
            assert float(quantizers(model)[name].limit) == pytest.approx(limit, rel=1e-6)


def test_static_scales_do_not_depend_on_chunks() -> None:
    found = []
    for size in (1, 3, 10):
        runtime = Runtime(progress=False, calib_batch_size=size)
        recipe = Recipe(method="rtn", scheme="W8A8_static", observer="percentile?q=99.9")
        model, _ = done(recipe, runtime=runtime)
        found.append({n: float(q.limit) for n, q in quantizers(model).items()})
    # Pads change the order of sums inside a pass by a few units of the last place.
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_equal_lengths_give_exactly_equal_scales() -> None:
    sequences = random_ids([16] * 10)
    found = []
    for size in (1, 2, 5, 10):
        model = make_model()
        compress(
            model,
            None,
            Recipe(method="rtn", scheme="W8A8_static", propagate="dense", targets=["*q_proj"]),
            Runtime(progress=False, calib_batch_size=size),
            CalibrationSet.of(sequences, seqlen=16),
        )
        found.append([float(q.limit) for q in quantizers(model).values()])
    assert len(found[0]) == 3
    # The first input is a norm of an embedding, which no sum over tokens enters.
    assert len({limits[0] for limits in found}) == 1
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


# --- transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "llama_tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "smoothquant"},
        {"method": "smoothquant", "transform": "smoothquant?alpha=0.9"},
        {"method": "awq"},
        {"method": "rotation"},
        {"method": "rotation", "transform": "rotation?seed=3&r2=false"},
    ],
    ids=lambda o: o.get("transform", o["method"]),
)
def test_transforms_alone_leave_the_logits(name: str, options: dict[str, Any]) -> None:
    if name == "gemma2" and options["method"] == "rotation":
        pytest.skip("norms behind its layers can not be folded")
    # W8A8 without weights rounded: smoothquant moves channels, inputs stay as they are.
    off = {"act_bits": 16} if options["method"] == "smoothquant" else {}
    model, report = done(Recipe(**options, bits=16, **off), name)
    before = logits(make_model(name))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=2e-4 * float(before.std()))
    assert report.transforms
    if options["method"] != "awq":  # which finds nothing to do
        assert not torch.equal(flat(model), flat(make_model(name)))


@dataclass(frozen=True)
class Noisy(Method):
    """Scales inputs and then moves every weight by a little noise of its own."""

    kind: ClassVar[str] = "quantization"
    statistic: ClassVar[str] = "gram+ranges"
    uses_heldout: ClassVar[bool] = True
    correction: ClassVar[float] = 0.5
    transform: InputScaling | None = None  # type: ignore[misc]

    def rounded_to_nearest(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return GridSpec(bits=3, group_size=-1).fit(weight, dtype).round(weight)

    def compress(self, weight: Tensor, stats: Any, dtype: Any = torch.float32) -> LayerResult:
        generator = torch.Generator().manual_seed(weight.numel())
        noise = torch.randn(weight.shape, generator=generator)
        return LayerResult(weight + 0.1 * float(weight.std()) * noise)


def assert_near(found: Tensor, wanted: Tensor, share: float = 1e-4) -> None:
    found, wanted = found.double(), wanted.double()
    assert float(wanted.norm()) > 0
    assert float((found - wanted).norm()) <= share * float(wanted.norm())


@pytest.mark.parametrize(
    ("name", "transform", "true_sequential"),
    [
        ("llama", AWQ(steps=5), True),
        ("qwen2", AWQ(steps=5), False),
        ("llama", SmoothQuant(alpha=0.7), False),
        ("qwen2", SmoothQuant(alpha=0.7), True),
    ],
    ids=lambda x: getattr(x, "stage", x) if not isinstance(x, InputScaling) else type(x).__name__,
)
def test_statistics_after_scaling_are_those_recorded_anew(
    transform: InputScaling, name: str, true_sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a rounding is told equals what the scaled model really receives.

    When the layers of a step are about to be compressed, a copy of the model is kept; that copy
    is run whole, one sequence at a time.
    """
    # Large weights: what blocks do is as large as what goes past them.
    model, dense = (make_model(name, initializer_range=0.2) for _ in range(2))
    moments: list[tuple[Any, list[str], dict[str, Any]]] = []
    solved = solve.Solver.solve

    def spy(self: Any, layers: Any, watched: Any) -> None:
        copies = {layer.name: copy.deepcopy(watched[id(layer)]) for layer in layers}
        moments.append((copy.deepcopy(model), [layer.name for layer in layers], copies))
        solved(self, layers, watched)

    monkeypatch.setattr(solve.Solver, "solve", spy)
    ids = random_ids(LENGTHS)
    held = engine.heldout_indices(len(ids), 0.2)
    blocks = engine.find_blocks(model)
    layers = engine.find_layers(blocks)[0]
    plan = engine.Plan(Noisy(transform=transform), layers, true_sequential=true_sequential)
    with left_as_found(model):
        result = engine.run(
            model, blocks, make_chunks(ids, held, 4, 0), plan, torch.device("cpu"), progress=False
        )
    factors = {
        f"{reader.removesuffix('.weight')}": done_["factors"]
        for done_ in result.transforms
        for reader in done_["readers"]
    }
    assert any(high / low > 1.05 for low, high in factors.values())
    kept = [x for i, x in enumerate(ids) if i not in held]
    out = [ids[i] for i in held]
    assert len(moments) == (12 if true_sequential else 3)
    for copied, names, watched in moments:
        found, other = inputs(copied, names, kept), inputs(copied, names, out)
        index = int(names[0].split(".")[2])
        # The dense model, with this block scaled: what is received there, and nothing before.
        clean = copy.deepcopy(dense)
        scaled = next(m for m, n, _ in moments if n[0].startswith(f"model.layers.{index}."))
        clean.model.layers[index].load_state_dict(scaled.model.layers[index].state_dict())
        wanted = inputs(clean, names, kept)
        for layer in names:
            seen = watched[layer]
            x, y = torch.cat(found[layer]).double(), torch.cat(wanted[layer]).double()
            for stats, parts in ((seen.stats, found[layer]), (seen.stats.heldout, other[layer])):
                rows = torch.cat(parts).double()
                assert isinstance(stats, GramRanges)
                assert stats.tokens == len(rows)
                ranges = stats.ranges
                assert_near(stats.gram(), rows.t() @ rows)
                assert_near(ranges.peak_first, torch.cat([p[:1] for p in parts]).abs().amax(0))
                later = torch.cat([p[1:] for p in parts]).abs().amax(0)
                assert_near(ranges.channel_max(first=False), later)
                assert_near(ranges.mean_abs(), rows.abs().mean(0))
                assert_near(ranges.energy(), rows.square().sum(0))
            # Few tokens: all of them are in the samples.
            assert_near(seen.used.rows(), x)
            assert_near(seen.heldout.rows(), torch.cat(other[layer]))
            if index or (true_sequential and "o_proj" in layer):
                assert_near(seen.cross, x.t() @ (y - x), 1e-3)
                # What blocks before have changed is not little.
                assert float((y - x).norm()) > 0.01 * float(x.norm())


@pytest.mark.parametrize("method", ["awq", "smoothquant", "rotation"])
def test_reported_errors_are_those_of_the_scaled_model(method: str) -> None:
    """The error of the first block, from the scaled weights and inputs that are in the model."""
    options = {"act_bits": 16} if method == "smoothquant" else {}
    model, report = done(Recipe(method=method, bits=3, group_size=8, **options))
    rows = {row.name: row for row in report.layers}
    # Rotated or scaled, the output of the block before rounding is the dense one: the error of
    # what is left can be compared with the dense output of the layers that no one divides.
    for local in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj"):
        name = f"model.layers.0.{local}"
        assert 0 < rows[name].error_calibration < 0.2
        assert 0 < rows[name].error_heldout < 0.3
    # Queries are read by no one else: their dense outputs, against those of the model at hand.
    name, dense = "model.layers.0.self_attn.q_proj", make_model()
    x, v = torch.cat(inputs(model, [name])[name]).double(), weight_of(model, name).double()
    y, w = torch.cat(inputs(dense, [name])[name]).double(), weight_of(dense, name).double()
    error = ((x @ v.t() - y @ w.t()) ** 2).sum() / ((y @ w.t()) ** 2).sum()
    assert rows[name].error_calibration == pytest.approx(float(error), rel=2e-3)


# --- autoround --------------------------------------------------------------------------------


def block_error(model: nn.Module, dense: nn.Module, index: int, before: nn.Module) -> float:
    """Return the mean squared error of a block's output, fed by the blocks of ``before``."""
    wanted, mine = copy.deepcopy(before), copy.deepcopy(before)
    wanted.model.layers[index].load_state_dict(dense.model.layers[index].state_dict())
    mine.model.layers[index].load_state_dict(model.model.layers[index].state_dict())
    total = count = 0.0
    for ids in used():
        outputs: list[Tensor] = []
        for one in (wanted, mine):

            def take(_m: Any, _a: Any, out: Any, outputs: list[Tensor] = outputs) -> None:
                outputs.append(out if isinstance(out, Tensor) else out[0])

            hook = one.model.layers[index].register_forward_hook(take)
            with torch.no_grad():
                one(input_ids=ids[None], use_cache=False)
            hook.remove()
        difference = (outputs[1].double() - outputs[0].double()).square()
        total, count = total + float(difference.sum()), count + difference.numel()
    return total / count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("propagate", ["compressed", "dense"])
def test_autoround_is_never_worse_than_nearest(dtype: torch.dtype, propagate: str) -> None:
    dense = make_model().to(dtype)
    recipe = Recipe(
        method="autoround",
        bits=2,
        group_size=8,
        symmetric=False,
        rounding="autoround?iters=10",
        propagate=propagate,
    )
    model, report = done(recipe, model=copy.deepcopy(dense))
    rows = {row.name: row for row in report.layers}
    for index in range(3):
        before = copy.deepcopy(dense if propagate == "dense" else model)
        nearest = copy.deepcopy(dense)
        for local in LOCAL:
            weight = weight_of(nearest, f"model.layers.{index}.{local}")
            grid = GridSpec(bits=2, group_size=8, symmetric=False).fit(weight.float(), dtype)
            weight.copy_(grid.round(weight.float()))
        learned = block_error(model, dense, index, before)
        plain = block_error(nearest, dense, index, before)
        # Bfloat16 rounds differently by the shape of a batch.
        assert learned <= plain * (1.02 if dtype == torch.bfloat16 else 1 + 1e-6)
        told = rows[f"model.layers.{index}.mlp.up_proj"].details
        near = 0.02 if dtype == torch.bfloat16 else 1e-4
        assert told["block_error_learned"] == pytest.approx(learned, rel=near)
        assert told["block_error_nearest"] == pytest.approx(plain, rel=near)
        if dtype == torch.float32:
            assert learned < plain
    for name in ALL:
        # Each group of 8 has 4 levels at most.
        groups = weight_of(model, name).float().reshape(-1, 8)
        assert max(len(group.unique()) for group in groups) <= 4


# --- promises ---------------------------------------------------------------------------------

EVERYTHING = [
    {"method": "rtn", "bits": 4, "group_size": 8},
    {"method": "gptq", "bits": 3, "group_size": 8, "damp": "auto"},
    {"method": "gptq", "bits": 4, "group_size": 8, "true_sequential": True, "correction": 0.3},
    {"method": "gptq_heldout", "scheme": "W8A8_static"},
    {"method": "awq", "bits": 4, "group_size": 8, "grid": "clip"},
    {"method": "smoothquant", "scheme": "W8A8"},
    {"method": "rotation", "bits": 4, "group_size": 8},
    {"method": "autoround", "bits": 3, "group_size": 8, "rounding": "autoround?iters=5"},
    {"method": "gptq", "bits": "auto:7", "group_size": 8},
    {"method": "sparsegpt+gptq", "sparsity": 0.5, "bits": 4, "group_size": 8},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(str(v) for k, v in options.items() if k not in ("group_size", "sparsity"))


def hooks_of(model: nn.Module) -> list[Any]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


@pytest.mark.parametrize("options", EVERYTHING, ids=label)
def test_twice_the_same_and_nothing_left_behind(options: dict[str, Any]) -> None:
    recipe, state = Recipe(**options), torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    one, first = done(recipe)
    other, second = done(recipe)
    assert first.weights_digest == second.weights_digest
    assert first.key == second.key
    assert torch.equal(flat(one), flat(other))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    rounded = sum(hasattr(m, QUANTIZER) for m in one.modules())
    assert len(hooks_of(one)) == rounded
    assert rounded == (21 if "W8A8" in str(options.get("scheme")) else 0)
    assert not any("forward" in m.__dict__ for m in one.modules())
    assert all(p.grad is None and p.requires_grad for p in one.parameters())
    assert list(one.state_dict()) == list(make_model().state_dict())


@pytest.mark.parametrize("options", EVERYTHING, ids=label)
@pytest.mark.parametrize("where", ["down", "norm"])
def test_a_failure_in_the_middle_leaves_no_hooks(options: dict[str, Any], where: str) -> None:
    """Activations turn to NaN in the last block, after others were compressed."""
    if not Recipe(**options).needs_data:
        options = {**options, "calibration": "random"}
    model, state = make_model(), torch.get_rng_state()
    last = model.model.layers[2]
    module = last.mlp if where == "down" else last.input_layernorm
    hook = module.register_forward_hook(lambda _m, _a, out: out * float("nan"))
    if where == "down" and options.get("bits") != "auto:7":
        # What leaves the last block is seen by the head alone.
        options = {**options, "targets": [*LOCAL, "lm_head"]}
    with pytest.raises(NumericalError, match=r"layers\.2|lm_head|rotation"):
        compress(model, None, Recipe(**options), QUIET, calibration())
    hook.remove()
    assert len(hooks_of(model)) == sum(hasattr(m, QUANTIZER) for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "method", ["rtn", "gptq", "gptq_heldout", "awq", "smoothquant", "rotation", "autoround", "hqq"]
)
def test_16_bits_change_no_bit(method: str) -> None:
    off: dict[str, Any] = {"act_bits": 16} if method == "smoothquant" else {}
    if method in ("awq", "smoothquant", "rotation"):
        off["transform"] = "none"
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = done(Recipe(method=method, bits=16, **off), model=make_model().to(dtype))
        assert torch.equal(flat(model), flat(make_model().to(dtype)))
        assert not hooks_of(model)


@pytest.mark.parametrize("method", ["gptq", "awq", "autoround"])
def test_chunks_change_hardly_anything(method: str) -> None:
    """A weight on the edge between two levels may go the other way, no more than that."""
    options = {"rounding": "autoround?iters=5"} if method == "autoround" else {}
    recipe = Recipe(method=method, bits=4, group_size=8, propagate="dense", **options)
    found = []
    for size in (1, 4, 10):
        model, _ = done(recipe, runtime=Runtime(progress=False, calib_batch_size=size))
        found.append(flat(model))
    for other in found[1:]:
        same = torch.isclose(other, found[0], rtol=1e-3, atol=1e-5).float().mean()
        assert same > 0.99 if method == "autoround" else same > 0.999
