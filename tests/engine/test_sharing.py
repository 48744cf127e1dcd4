"""Shared statistics: one pass for many runs, and the very same weights and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Report, Runtime, allocation, compress
from lm_calib_plugin.engine import shared_statistics, sharing, walk
from lm_calib_plugin.engine.sharing import Shared
from lm_calib_plugin.engine.solve import Solver
from lm_calib_plugin.engine.watched import Watched, bytes_of, copied
from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.pruning.pipeline import Pipeline
from lm_calib_plugin.statistics import STATISTICS, TokenSample
from tests.tiny import make_model, random_ids

QUIET = Runtime(progress=False, calib_batch_size=4)
LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32]
BLOCKS = 3
# 10 sequences, 1 of them held out, by 4: three chunks of statistics and one held out.
CHUNKS = 4


def calibration(lengths: list[int] = LENGTHS, seed: int = 1, **given: Any) -> CalibrationSet:
    return CalibrationSet.of(random_ids(lengths, seed), seqlen=32, **given)


def recipe(method: str, **fields: Any) -> Recipe:
    return Recipe(**{"method": method, "propagate": "dense", **fields})


def run(
    one: Recipe,
    name: str = "llama",
    runtime: Runtime = QUIET,
    drawn: CalibrationSet | None = None,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], Report]:
    model = make_model(name, seed)
    report = compress(model, None, one, runtime, drawn or calibration())
    return {n: p.detach().clone() for n, p in model.named_parameters()}, report


def content(report: Report) -> dict[str, Any]:
    """All of a report but seconds and the memory of the process."""
    values = dataclasses.asdict(dataclasses.replace(report, calibration_set=None, grids={}))
    for name in ("seconds", "peak_memory_gib", "calibration_set", "grids"):
        del values[name]
    values["layers"] = [{k: v for k, v in r.items() if k != "seconds"} for r in values["layers"]]
    return values


def assert_same(first: Any, second: Any) -> None:
    assert first[0].keys() == second[0].keys()
    for name, tensor in first[0].items():
        assert torch.equal(tensor, second[0][name]), name
    assert content(first[1]) == content(second[1])
    assert first[1].grids.keys() == second[1].grids.keys()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run so far: a name for every call of a chunk through a block, or its capture."""
    done: list[str] = []

    def counted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(walk.InputGroups, "watch")
    counted(walk._Walk, "capture")
    counted(walk._Walk, "groups")
    counted(walk._Walk, "propagate")
    return done


def forwards(model: nn.Module) -> list[int]:
    """The number of every block that is run on a chunk, filled as it happens."""
    found: list[int] = []
    for index, block in enumerate(model.model.layers):  # type: ignore[union-attr, arg-type]
        block.register_forward_hook(lambda _m, _a, _o, index=index: found.append(index))
    return found


LEVELS = [
    recipe("wanda", sparsity=0.3),
    recipe("wanda", sparsity=0.5),
    recipe("wanda", pattern="2:4"),
    recipe("sparsegpt", sparsity=0.3),
    recipe("sparsegpt", sparsity=0.5),
    recipe("sparsegpt", pattern="2:4"),
    recipe("gptq", bits=4, group_size=8),
    recipe("gptq", bits=3, group_size=8),
    recipe("ria", sparsity=0.5),
    recipe("magnitude", sparsity=0.5),
    recipe("rtn", bits=4, group_size=8),
    recipe("alps", sparsity=0.5),
    recipe("swap_pcg", sparsity=0.5),
    recipe("gptq_heldout", bits=3, group_size=8),
    recipe("sparsegpt+gptq", sparsity=0.5, bits=4, group_size=8),
]


def test_many_levels_and_methods_are_what_they_are_alone() -> None:
    """Also in the other order, so that others are the first."""
    alone = [run(one) for one in LEVELS]
    for order in (LEVELS, LEVELS[::-1]):
        with shared_statistics() as shared:
            for one in order:
                assert_same(run(one), alone[LEVELS.index(one)])
            assert shared.hits >= len(order) - 5


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "gpt2", "bloom"])
def test_other_architectures(name: str) -> None:
    levels = [recipe("wanda", sparsity=0.5), recipe("wanda", pattern="2:4")]
    alone = [run(one, name) for one in levels]
    with shared_statistics() as shared:
        for one, expected in zip(levels, alone, strict=True):
            assert_same(run(one, name), expected)
        assert shared.hits == 1


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_borrow_as_they_do_alone(name: str) -> None:
    levels = [recipe("sparsegpt", sparsity=s) for s in (0.3, 0.6)]
    drawn = calibration(LENGTHS[5:])
    alone = [run(one, name, drawn=drawn) for one in levels]
    # Otherwise this proves nothing.
    assert any(row.borrowed for row in alone[1][1].layers)
    with shared_statistics() as shared:
        for one, expected in zip(levels, alone, strict=True):
            assert_same(run(one, name, drawn=drawn), expected)
        assert shared.hits == 1


def test_the_head_and_rounded_inputs_share_too() -> None:
    """The head is behind all blocks; inputs are rounded behind what is watched."""
    head = {"targets": ("*_proj", "lm_head"), "untie": True}
    cells = [recipe("wanda", sparsity=s, **head) for s in (0.3, 0.5)]
    cells += [recipe("gptq", bits=4, group_size=8, act_bits=b) for b in (8, 16, 6)]
    names = ["llama_tied"] * 2 + ["llama"] * 3
    alone = [run(one, name) for one, name in zip(cells, names, strict=True)]
    assert any("lm_head" in row.name for row in alone[0][1].layers)
    with shared_statistics() as shared:
        for one, name, expected in zip(cells, names, alone, strict=True):
            assert_same(run(one, name), expected)
        assert shared.hits == 3


def test_one_pass_serves_all_levels(passes: list[str]) -> None:
    with shared_statistics() as shared:
        model = make_model()
        found = forwards(model)
        compress(model, None, LEVELS[0], QUIET, calibration())
        assert passes.count("watch") == BLOCKS * CHUNKS
        assert found.count(1) >= CHUNKS
        passes.clear()
        for one in LEVELS[1:3]:
            model = make_model()
            found = forwards(model)
            report = compress(model, None, one, QUIET, calibration())
            assert found == []
            assert "capture" not in report.seconds
        assert passes == []
        assert shared.hits == 2


def test_layers_with_options_of_their_own() -> None:
    """Statistics of one kind serve them all; another kind is watched anew."""
    own = {"overrides": {"*.q_proj": {"bits": 8}, "*.1.mlp.*": {"bits": 16}}}
    cells = [recipe("gptq", bits=4, group_size=8), recipe("gptq", bits=3, group_size=8, **own)]
    alone = [run(one) for one in cells]
    with shared_statistics() as shared:
        for one, expected in zip(cells, alone, strict=True):
            assert_same(run(one), expected)
        assert shared.hits == 1


def other_ids() -> CalibrationSet:
    """The set of the others with one id changed behind its back, under the same name."""
    drawn = calibration()
    drawn.sequences[4][2] += 1
    return drawn


PLAIN = recipe("wanda", sparsity=0.5)
OTHERS: dict[str, dict[str, Any]] = {
    "draw": {"drawn": calibration(seed=2)},
    "ids": {"drawn": other_ids()},
    "weights": {"drawn": calibration(weights=[1, 2] * 5)},
    "fewer": {"drawn": calibration(LENGTHS[:-1])},
    "model": {"seed": 5},
    "architecture": {"name": "llama_tied"},
    "heldout": {"one": PLAIN.replaced(heldout=0.2)},
    "chunks": {"runtime": dataclasses.replace(QUIET, calib_batch_size=3)},
    "first token": {"one": PLAIN.replaced(exclude_first_token=True)},
    "more layers": {"one": PLAIN.replaced(targets=("*_proj", "lm_head"), untie=True)},
    "kind": {"one": recipe("sparsegpt", sparsity=0.5)},
}


@pytest.mark.parametrize("change", OTHERS)
def test_whatever_is_watched_otherwise_is_not_shared(change: str) -> None:
    given = {"one": PLAIN, **OTHERS[change]}
    alone = run(**given)
    with shared_statistics() as shared:
        run(PLAIN)
        assert_same(run(**given), alone)
        assert shared.hits == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda", "sparsity": 0.5, "propagate": "compressed"},
        {"method": "sparsegpt", "sparsity": 0.5, "correction": 0.3, "propagate": "compressed"},
        {
            "method": "sparsegpt",
            "sparsity": 0.5,
            "true_sequential": True,
            "propagate": "compressed",
        },
        {"method": "awq", "bits": 4, "group_size": 8},
        {"method": "rtn", "bits": 4, "group_size": 8, "transform": "rotation"},
        {"method": "gptq", "bits": 4, "group_size": 8, "act_bits": 8, "act_dynamic": False},
        {"method": "rtn", "rounding": "autoround?iters=2", "bits": 4, "group_size": 8},
        {"method": "shortgpt", "blocks": 1},
    ],
    ids=lambda fields: "-".join(str(v) for v in fields.values()),
)
def test_what_depends_on_the_method_is_not_shared(fields: dict[str, Any]) -> None:
    one = Recipe(**{"propagate": "dense", **fields})
    alone = run(one)
    with shared_statistics() as shared:
        run(PLAIN)
        kept = shared.bytes
        for _ in range(2):
            assert_same(run(one), alone)
        assert (shared.hits, shared.bytes) == (0, kept)


def test_nothing_is_shared_outside(passes: list[str]) -> None:
    with shared_statistics() as shared:
        run(PLAIN)
        assert shared.bytes > 0
    assert shared.bytes == 0
    assert sharing.shared_here() is None
    passes.clear()
    run(PLAIN)
    run(PLAIN)
    assert passes.count("capture") == 2


def test_a_context_inside_another_and_another_thread_start_empty() -> None:
    found: list[bool] = []
    with shared_statistics() as outer:
        run(PLAIN)
        with shared_statistics() as inner:
            run(PLAIN)
            assert inner.hits == outer.hits == 0
        thread = threading.Thread(target=lambda: found.append(sharing.shared_here() is not None))
        thread.start()
        thread.join()
        run(PLAIN)
        assert outer.hits == 1
    assert found == [False]


def test_a_method_that_scribbles_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tensors it is given: neither the first nor a later run sees what it left."""
    alone = {one.method: run(one) for one in (LEVELS[4], LEVELS[6])}
    with shared_statistics() as shared:
        for _ in range(2):
            with scribbling(monkeypatch), contextlib.suppress(NumericalError):
                run(recipe("sparsegpt", sparsity=0.2))
            for one in (LEVELS[4], LEVELS[6]):
                assert_same(run(one), alone[one.method])
        assert shared.hits == 5


@contextlib.contextmanager
def scribbling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let all methods overwrite what they are told, samples and counts too, after they used it."""
    real_solve, real_row = Pipeline.compress_together, Solver._row

    def solve(self: Any, weights: Any, stats: Any, dtype: torch.dtype = torch.float32) -> Any:
        results = real_solve(self, weights, stats.scaled(1.0), dtype)
        stats.matrix.fill_(7)
        stats.tokens = 3
        return results

    def row(self: Any, layer: Any, before: Any, result: Any, seen: Any, start: float) -> Any:
        made = real_row(self, layer, before, result, seen, start)
        for rows in (*seen.used._rows, *seen.heldout._rows):
            rows.fill_(7)
        seen.used.seen = 1
        seen.used._rows.clear()
        return made

    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "compress_together", solve)
        patched.setattr(Solver, "_row", row)
        yield


def test_statistics_of_every_kind_are_copied_whole() -> None:
    """No tensor of a copy is one of the original's, and all are equal."""
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for kind in STATISTICS.values():
        stats = kind.empty(5)
        stats.heldout = kind.empty(5)
        samples = TokenSample(9, 4), TokenSample(9, 4)
        for part in (stats, stats.heldout, *samples):
            part.update(rows)
        seen = Watched(stats, *samples)
        twin = copied(seen, torch.device("cpu"))
        pairs = list(zip(tensors(seen), tensors(twin), strict=True))
        assert len(pairs) >= 4
        for one, other in pairs:
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
            assert one.data_ptr() != other.data_ptr()
        assert bytes_of(seen) == sum(one.nbytes for one, _ in pairs)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor below an object, however deep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from tensors(part)
    elif hasattr(value, "__dict__"):
        for part in vars(value).values():
            yield from tensors(part)


def test_what_does_not_fit_is_not_kept_and_said(passes: list[str]) -> None:
    alone = run(PLAIN)
    with shared_statistics(limit_bytes=1000) as shared:
        for _ in range(2):
            weights, report = run(PLAIN)
            assert shared.bytes == 0
            (warning,) = set(report.warnings) - set(alone[1].warnings)
            assert "GiB are allowed" in warning
            report.warnings.remove(warning)
            assert_same((weights, report), alone)
    assert passes.count("capture") == 3


def test_the_limit_is_that_of_all_sets_and_the_oldest_goes_first() -> None:
    sets = [calibration(seed=seed) for seed in range(3)]
    with shared_statistics() as shared:
        run(PLAIN, drawn=sets[0])
        size = shared.bytes
    assert size > 0
    with shared_statistics(limit_bytes=2 * size) as shared:
        for number in (0, 1, 0, 2):
            run(PLAIN, drawn=sets[number])
            assert shared.bytes <= 2 * size
        assert shared.hits == 1
        run(PLAIN, drawn=sets[0])
        assert shared.hits == 2
        run(PLAIN, drawn=sets[1])
        assert shared.hits == 2
    # A set that just fits is kept; one byte less, and it is not.
    for limit, kept in ((size, size), (size - 1, 0)):
        with shared_statistics(limit_bytes=limit) as shared:
            _, report = run(PLAIN)
            assert shared.bytes == kept
            assert any("not shared" in w for w in report.warnings) == (not kept)


def test_a_set_that_can_not_fit_drives_no_other_out() -> None:
    with shared_statistics() as shared:
        run(PLAIN)
        size = shared.bytes
    with shared_statistics(limit_bytes=size) as shared:
        run(PLAIN)
        run(recipe("sparsegpt", sparsity=0.5))
        assert shared.bytes == size
        run(PLAIN)
        assert shared.hits == 1


def test_a_first_block_that_is_the_largest_misleads_once() -> None:
    one = PLAIN.replaced(ignore=("*.1.mlp.*", "*.2.*"))
    alone = run(one)
    with shared_statistics() as shared:
        run(one)
        size = shared.bytes
    with shared_statistics(limit_bytes=size) as shared:
        for hits in (0, 0, 1):
            assert_same(run(one), alone)
            assert shared.hits == hits


def test_a_container_may_have_less_memory_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_CGROUP", tmp_path)
    machine = sharing.free_memory()
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 4000\ninactive_file 700\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert sharing.free_memory() > machine / 2
    (tmp_path / "memory.max").write_text("9000\n")
    assert sharing.free_memory() == 9000 - 5000 + 700


def test_the_default_limit_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = sharing.free_memory()
    assert 2**20 < free < 2**50
    shared = Shared()
    monkeypatch.setattr(sharing, "free_memory", lambda: 600)
    assert shared.allowed == 300
    shared.keep("a", "value", 200)
    # What is held is not free any more, and counts nonetheless.
    monkeypatch.setattr(sharing, "free_memory", lambda: 400)
    assert shared.allowed == 300
    shared.keep("b", "value", 200)
    assert (shared.recall("a"), shared.recall("b")) == (None, "value")


def test_memory_that_is_taken_on_the_way_does_not_count_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a run watches makes less memory free; its limit is that of its beginning."""
    with shared_statistics() as shared:
        run(PLAIN)
        size = shared.bytes
    asked: list[int] = []

    def shrinking() -> int:
        asked.append(1)
        return 2 * size if len(asked) == 1 else size

    monkeypatch.setattr(sharing, "free_memory", shrinking)
    with shared_statistics() as shared:
        run(PLAIN)
        assert shared.bytes == size


@pytest.mark.parametrize("limit", [0, -1, 1.5, "much"])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(UserError, match="limit_bytes"), shared_statistics(limit):
        pass


@pytest.mark.parametrize("stage", ["observe", "solve"])
def test_a_run_that_fails_leaves_nothing(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run(PLAIN)
    calls: list[int] = []
    owner, name = {
        "observe": (walk.InputGroups, "watch"),
        "solve": (Solver, "_compressed"),
    }[stage]
    real = getattr(owner, name)

    def fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with shared_statistics() as shared:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails)
            with pytest.raises(KeyboardInterrupt):
                run(PLAIN)
        assert shared.bytes == 0
        for _ in range(2):
            assert_same(run(PLAIN), alone)
        assert shared.hits == 1


def test_chunks_that_were_halved_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over other chunks have other last bits than those of a run with memory enough."""
    alone = run(PLAIN)
    real = walk.InputGroups.watch

    def short(self: Any, chunk: Any, *args: Any, **kwargs: Any) -> Any:
        if chunk.rows > 2:
            raise torch.OutOfMemoryError("for a test")
        return real(self, chunk, *args, **kwargs)

    with shared_statistics() as shared:
        with monkeypatch.context() as patched:
            patched.setattr(walk.InputGroups, "watch", short)
            _, report = run(PLAIN)
        assert any("out of memory" in w for w in report.warnings)
        assert shared.bytes == 0
        assert_same(run(PLAIN), alone)
        assert shared.hits == 0


@pytest.mark.parametrize("propagate", ["dense", "compressed"])
def test_the_pass_of_an_allocation_is_shared(propagate: str, monkeypatch: Any) -> None:
    """It looks at the dense model, whatever the run does afterwards."""
    dense_passes: list[int] = []
    real = allocation.dense_pass

    def counted(*args: Any) -> Any:
        dense_passes.append(1)
        return real(*args)

    monkeypatch.setattr(allocation, "dense_pass", counted)
    cells = [recipe("owl", sparsity=s, propagate=propagate) for s in (0.5, 0.6, 0.7)]
    cells.append(cells[0].replaced(allocation="atp"))
    cells.append(recipe("wanda", sparsity=0.5, allocation="global", propagate=propagate))
    alone = [run(one) for one in cells]
    dense_passes.clear()
    with shared_statistics():
        for one, expected in zip(cells, alone, strict=True):
            assert_same(run(one), expected)
        assert len(dense_passes) == 1
        run(cells[0], drawn=calibration(seed=2))
        assert len(dense_passes) == 2


def test_the_allocation_of_a_rotated_model_is_its_own() -> None:
    fields = {"bits": 4, "group_size": 8, "sparsity": 0.5, "allocation": "owl"}
    cells = [recipe("wanda+rtn", transform=t, **fields) for t in (None, "rotation")]
    alone = [run(one) for one in cells]
    with shared_statistics() as shared:
        for one, expected in zip(cells, alone, strict=True):
            assert_same(run(one), expected)
        assert shared.hits == 0
