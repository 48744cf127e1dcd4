"""One pass for several kinds of statistics: weights and reports of runs alone, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lm_calib_plugin.engine import shared_statistics, walk, watched
from lm_calib_plugin.engine.sharing import Shared
from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.statistics import (
    STATISTICS,
    Gram,
    LayerStats,
    components,
    factor,
    known_kinds,
    put_together,
    taken_apart,
)
from tests.engine.test_sharing import (
    BLOCKS,
    CHUNKS,
    LENGTHS,
    LEVELS,
    PLAIN,
    assert_same,
    calibration,
    passes,
    recipe,
    run,
    tensors,
)

__all__ = ["passes"]

KINDS = ("moments", "gram")
MIXED = [
    recipe("wanda", sparsity=0.5),
    recipe("sparsegpt", sparsity=0.5),
    recipe("gptq", bits=4, group_size=8),
    recipe("rtn", bits=4, group_size=8),
    recipe("wanda", sparsity=0.3),
]


def statistics_in(shared: Shared) -> int:
    """Bytes without factors, which only stay as long as there is room."""
    return sum(size for _, size in shared._held.values())


@pytest.mark.parametrize("order", [1, -1])
def test_one_pass_serves_all_kinds(order: int, passes: list[str]) -> None:
    """The pass of the first run is all that is run."""
    cells = MIXED[::order]
    alone = [run(one) for one in cells]
    passes.clear()
    with shared_statistics(kinds=KINDS) as shared:
        for one, expected in zip(cells, alone, strict=True):
            assert_same(run(one), expected)
        assert shared.hits == len(cells) - 1
    assert passes.count("watch") == BLOCKS * CHUNKS
    assert passes.count("capture") == 1


def test_every_method_is_what_it_is_alone_when_all_kinds_are_watched() -> None:
    """Kinds that are sums of others, and the sequences held out, too."""
    methods = ("wanda", "sparsegpt", "gptq", "ria", "magnitude", "gptq_heldout", "sparsegpt+gptq")
    cells = [*{one.method: one for one in LEVELS if one.method in methods}.values()]
    cells.append(recipe("dsnot", sparsity=0.5))
    cells.append(recipe("sparsegpt", sparsity=0.5, refine="dsnot"))
    kinds = [f"{kind}+heldout" for kind in ("moments", "gram+spread", "ranges")]
    alone = [run(one) for one in cells]
    for order in (1, -1):
        with shared_statistics(kinds=kinds) as shared:
            for one, expected in list(zip(cells, alone, strict=True))[::order]:
                assert_same(run(one), expected)
            assert shared.hits == len(cells) - 1


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_borrow_of_each_kind(name: str) -> None:
    drawn = calibration(LENGTHS[5:])
    alone = [run(one, name, drawn=drawn) for one in MIXED]
    assert any(row.borrowed for row in alone[0][1].layers)
    assert not any(row.borrowed for row in alone[3][1].layers)
    for order in (1, -1):
        with shared_statistics(kinds=KINDS) as shared:
            for one, expected in list(zip(MIXED, alone, strict=True))[::order]:
                assert_same(run(one, name, drawn=drawn), expected)
            assert shared.hits == len(MIXED) - 1


def test_runs_without_held_out_statistics_use_those_of_runs_with_them() -> None:
    chooses = recipe("gptq_heldout", bits=3, group_size=8)
    plain = recipe("gptq", bits=3, group_size=8)
    alone = {one.method: run(one) for one in (chooses, plain)}
    # How many of these runs find what they need.
    for cells, kinds, hits in (
        ([chooses, plain], (), 1),
        ([plain, chooses], (), 0),
        ([plain, chooses, plain], ("gram+heldout",), 2),
    ):
        with shared_statistics(kinds=kinds) as shared:
            for one in cells:
                assert_same(run(one), alone[one.method])
            assert shared.hits == hits


@pytest.mark.parametrize(
    ("fields", "name", "hits"),
    [
        ({"ignore": ("*.up_proj", "*.0.*")}, "llama", 1),
        ({"ignore": ("q_proj",)}, "llama", 1),
        ({"targets": ("down_proj",), "ignore": ("*.2.*",)}, "llama", 1),
        ({"ignore": ("*.experts.*",)}, "mixtral", 1),
        ({"ignore": ("*.self_attn.*",)}, "mixtral", 1),
        # The other experts of the block would borrow from it.
        ({"ignore": ("*.1.*.experts.0.*",)}, "mixtral", 0),
        ({"ignore": ("*.1.*.experts.*",)}, "mixtral", 1),
    ],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_runs_of_fewer_layers_use_those_of_more(
    method: str, fields: dict[str, Any], name: str, hits: int
) -> None:
    whole, fewer = recipe(method, sparsity=0.5), recipe(method, sparsity=0.5, **fields)
    drawn = calibration(LENGTHS[5:])
    alone = run(fewer, name, drawn=drawn)
    all_of_them = run(whole, name, drawn=drawn)
    assert 0 < len(alone[1].layers) < len(all_of_them[1].layers)
    with shared_statistics() as shared:
        run(whole, name, drawn=drawn)
        assert_same(run(fewer, name, drawn=drawn), alone)
        assert shared.hits == hits
    with shared_statistics() as shared:
        run(fewer, name, drawn=drawn)
        assert_same(run(whole, name, drawn=drawn), all_of_them)
        assert shared.hits == 0


def test_the_head_and_rounded_inputs() -> None:
    head = {"targets": ("*_proj", "lm_head"), "untie": True}
    cells = [recipe("wanda", sparsity=0.5, **head), recipe("sparsegpt", sparsity=0.5, **head)]
    cells.append(recipe("gptq", bits=4, group_size=8, act_bits=8))
    cells += [recipe("wanda", sparsity=0.5), recipe("gptq", bits=4, group_size=8)]
    names = ["llama_tied", "llama_tied", "llama", "llama", "llama"]
    alone = [run(one, name) for one, name in zip(cells, names, strict=True)]
    with shared_statistics(kinds=KINDS) as shared:
        for one, name, expected in zip(cells, names, alone, strict=True):
            assert_same(run(one, name), expected)
        assert shared.hits == 3


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_kinds_those_are_kept_that_fit(first: int, passes: list[str]) -> None:
    """The smaller one; who needs the other one watches it, and says that it is not kept."""
    cells = [MIXED[0], MIXED[1]][:: 1 - 2 * first]
    alone = {one.method: run(one) for one in cells}
    with shared_statistics() as shared:
        run(MIXED[0])
        small = statistics_in(shared)
    with shared_statistics() as shared:
        run(MIXED[1])
        large = statistics_in(shared)
    assert small < large
    passes.clear()
    with shared_statistics(limit_bytes=large - 1, kinds=KINDS) as shared:
        for one in cells * 2:
            weights, report = run(one)
            notes = [w for w in report.warnings if "not shared" in w]
            assert len(notes) == (one.method == "sparsegpt")
            report.warnings[:] = [w for w in report.warnings if w not in notes]
            assert_same((weights, report), alone[one.method])
            assert statistics_in(shared) == small
            assert shared.bytes < large
        assert shared.hits == (2 if first else 1)
    assert passes.count("capture") == (2 if first else 3)


def test_a_kind_that_overflows_is_an_error_of_who_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = run(PLAIN)
    monkeypatch.setattr(Gram, "is_finite", lambda _self: False)
    with shared_statistics(kinds=KINDS) as shared:
        for _ in range(2):
            assert_same(run(PLAIN), alone)
        assert shared.hits == 1
        with pytest.raises(NumericalError):
            run(MIXED[1])


def test_short_memory_first_ends_what_is_watched_for_others(
    monkeypatch: pytest.MonkeyPatch, passes: list[str]
) -> None:
    """Smaller chunks have sums with other last bits, which alone the run would not have got."""
    alone = run(PLAIN)
    real = walk.listen

    def short(inputs: Any, chunk: Any, *args: Any) -> None:
        if len(passes) > 10 and inputs[0].others:
            raise torch.OutOfMemoryError("for a test")
        real(inputs, chunk, *args)

    monkeypatch.setattr(walk, "listen", short)
    passes.clear()
    with shared_statistics(kinds=KINDS) as shared:
        for _ in range(2):
            assert_same(run(PLAIN), alone)
        assert len(passes) > 10
        assert shared.hits == 1
        gram = MIXED[1]
        expected = run(gram)
        assert shared.hits == 1
    assert_same(expected, run(gram))


def test_kinds_may_be_declared_on_the_way() -> None:
    with shared_statistics() as shared:
        run(PLAIN)
        shared.expect(["gram", "moments"])
        # The Gram matrices are watched by the next run that watches at all.
        run(PLAIN.replaced(exclude_first_token=True))
        run(MIXED[1].replaced(exclude_first_token=True))
        assert shared.hits == 1
        run(MIXED[1])
        assert shared.hits == 1


@pytest.mark.parametrize("kinds", ["wanda", ["gram", "heldout"], ["spread+ranges"], [3]])
def test_kinds_that_there_are_not(kinds: Any) -> None:
    words = "kinds: got .* allowed: none, moments"
    with pytest.raises(UserError, match=words), shared_statistics(kinds=kinds):
        pass


@pytest.mark.parametrize("heldout", [False, True])
@pytest.mark.parametrize("kind", STATISTICS)
def test_parts_are_what_they_are_alone_and_make_the_whole(kind: str, heldout: bool) -> None:
    """Each part, of rows and of rows held out, equals a statistic of its own kind."""
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))

    def seen(name: str, start: int = 0) -> LayerStats:
        made = STATISTICS[name].empty(5)
        made.update(rows[start:4], None, torch.tensor([0, 0, 1, 1])[start:])
        made.update(rows[4:], torch.tensor([1.0, 2, 1, 1, 3]), torch.tensor([2, 2, 3, 4, 4]))
        return made

    whole = seen(kind)
    whole.heldout = seen(kind, 2) if heldout else None
    parts = taken_apart(kind, whole)
    assert parts.keys() == components(kind, heldout)
    for (name, side), part in parts.items():
        alone = seen(name, 2 * side)
        assert type(part) is type(alone)
        assert vars(part).keys() == vars(alone).keys()
        assert part.heldout is None
        assert part.tokens == alone.tokens
        for one, other in zip(tensors(part), tensors(alone), strict=True):
            assert torch.equal(one, other)
    again = put_together(kind, heldout, parts)
    assert again is not None
    assert type(again) is type(whole)
    assert vars(again).keys() == vars(whole).keys()
    for one, other in zip(tensors(again), tensors(whole), strict=True):
        assert torch.equal(one, other)
    if heldout:
        assert again.heldout is not None
        assert again.heldout.tokens == 7
    # What is not asked for is not handed out.
    less = put_together(kind, False, parts)
    assert less is not None
    assert less.heldout is None


def test_every_kind_can_be_declared() -> None:
    assert {f"{k}+heldout" for k in STATISTICS} | {*STATISTICS, "none"} == set(known_kinds())
    assert components("gram+spread+heldout") == components("gram+spread", heldout=True)
    assert components("none", heldout=True) == frozenset()


def test_overrides_that_keep_weights_use_the_same_statistics() -> None:
    own = {"overrides": {"*.1.mlp.*": {"bits": 16}}}
    cells = [recipe("gptq", bits=4, group_size=8), recipe("gptq", bits=3, group_size=8, **own)]
    cells.append(PLAIN)
    alone = [run(one) for one in cells]
    with shared_statistics(kinds=KINDS) as shared:
        for one, expected in zip(cells, alone, strict=True):
            assert_same(run(one), expected)
        assert shared.hits == 2


@pytest.fixture
def factored(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ridge of every Gram matrix that is really factored."""
    found: list[float] = []
    real = factor._computed

    def counted(gram: torch.Tensor, damp: float) -> Any:
        found.append(damp)
        return real(gram, damp)

    monkeypatch.setattr(factor, "_computed", counted)
    return found


def test_equal_matrices_are_factored_once(factored: list[float]) -> None:
    """Those of runs to come, and of layers that share an input; each of a block has four inputs."""
    levels = [recipe("sparsegpt", sparsity=s) for s in (0.3, 0.5)]
    alone = [run(one) for one in levels]
    factored.clear()
    with shared_statistics() as shared:
        for one, expected in zip(levels, alone, strict=True):
            assert_same(run(one), expected)
        assert len(factored) == 4 * BLOCKS
        run(levels[0].replaced(damp=0.02))
        assert len(factored) == 8 * BLOCKS
        assert shared.bytes > statistics_in(shared)
        # What every run sees of its own, nobody else needs.
        run(levels[0].replaced(propagate="compressed"))
        before = len(factored)
        run(levels[0].replaced(propagate="compressed"))
        assert len(factored) > before


def test_factors_take_no_room_of_statistics(factored: list[float]) -> None:
    one = recipe("sparsegpt", sparsity=0.5)
    alone = run(one)
    with shared_statistics() as shared:
        run(one)
        size = statistics_in(shared)
    factored.clear()
    with shared_statistics(limit_bytes=size) as shared:
        for hits in (0, 1):
            assert_same(run(one), alone)
            assert shared.bytes == size
            assert shared.hits == hits
        assert len(factored) > 4 * BLOCKS
    # Those of one set make way for statistics of another.
    with shared_statistics(limit_bytes=2 * size) as shared:
        run(one)
        assert shared.bytes > size
        run(one, drawn=calibration(seed=2))
        assert statistics_in(shared) == 2 * size == shared.bytes
        run(one)
        run(one, drawn=calibration(seed=2))
        assert shared.hits == 2


def test_outputs_of_dense_layers_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    real = watched.output_energy

    def counted(*args: Any) -> float:
        measured.append(1)
        return real(*args)

    monkeypatch.setattr(watched, "output_energy", counted)
    with shared_statistics(kinds=KINDS):
        for one in MIXED:
            _, report = run(one)
        # On the sample of rows, and on that of rows held out.
        assert len(measured) == 2 * len(report.layers)
