"""Several processes: the same weights in all of them, and those of one within rounding."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lm_calib_plugin.engine.batches import Chunk, heldout_indices, make_chunks
from lm_calib_plugin.engine.dealing import UNEVEN, deal, whole
from lm_calib_plugin.engine.ranks import Ranks
from tests.engine.ranks_cases import CASES, FEW, facts, run, tensors
from tests.tiny import random_ids

ROOT = Path(__file__).parents[2]
# Methods without products of inputs: sums of squares in float64 keep their bits after rounding.
EXACT = ("wanda", "owl", "rtn", "static", "blocks", "autoround", "rotated", "widths", "shared")
WHOLE = ("autoround", "blocks", "shared")


def together(count: int, folder: Path, *script: str) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", *(script or ("-m", "tests.engine.ranks_cases"))]
    return [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What every process found, by their number; each number is run once."""
    folders = {}

    @cache
    def of(count: int) -> tuple[list[dict[str, Any]], Path]:
        folder = folders.setdefault(count, tmp_path_factory.mktemp(f"ranks-{count}"))
        for process in together(count, folder):
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors[-3000:]
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)], folder

    return of


@cache
def alone(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What one process finds."""
    torch.set_num_threads(1)
    model, report = run((CASES | FEW)[name])
    return tensors(model), facts(report)


RUNS = [(2, name) for name in CASES] + [(3, name) for name in FEW]


@pytest.mark.parametrize(("count", "name"), RUNS, ids=str)
def test_all_processes_end_with_the_same_weights_and_report(
    count: int, name: str, found: Any
) -> None:
    first, *others = (own[name] for own in found(count)[0])
    for other in others:
        assert other == first


@pytest.mark.parametrize(("count", "name"), RUNS, ids=str)
def test_weights_are_those_of_one_process(count: int, name: str, found: Any) -> None:
    """Bit for bit without products of inputs; else within the rounding of sums."""
    reports, folder = found(count)
    many, (one, report) = load_file(folder / f"{name}.safetensors"), alone(name)
    same = name.split(",")[0].split(" ")[0] in EXACT
    for key, expected in one.items():
        if same:
            assert torch.equal(many[key], expected), key
            continue
        agree = torch.isclose(many[key], expected, rtol=1e-3, atol=1e-5).float().mean()
        # Two swaps of nearly equal worth may change places, and then all that follows: another
        # chunk size moves up to 2 % of these weights in one process, too.
        assert agree > (0.97 if name == "corrected" else 0.999), key
    assert (reports[0][name]["digest"] == report["digest"]) >= same
    assert reports[0][name]["key"] == report["key"]


@pytest.mark.parametrize(("count", "name"), RUNS, ids=str)
def test_reports_are_those_of_one_process(count: int, name: str, found: Any) -> None:
    """Tokens, samples and notes: errors are measured on the very rows that one process keeps."""
    own, expected = found(count)[0][0][name], alone(name)[1]
    assert own["grids"] == expected["grids"]
    assert own["achieved"].keys() == expected["achieved"].keys()
    assert own["achieved"]["sparsity"] == pytest.approx(expected["achieved"]["sparsity"])
    for row, other in zip(own["layers"], expected["layers"], strict=True):
        for key in ("name", "tokens", "removed", "bits", "borrowed", "fallback", "asked"):
            assert row[key] == other[key], (row["name"], key)
        # Which tokens of an expert are kept depends on where the sequences lie.
        close = 0.5 if "experts" in row["name"] else 1e-3
        for key in ("error_calibration", "error_heldout", "input_limit", "input_limit_rest"):
            if other[key] is None:
                assert row[key] is None
            else:
                assert row[key] == pytest.approx(other[key], rel=close), (row["name"], key)
    notes = [note for note in own["warnings"] if not note.startswith("every process ")]
    assert notes == expected["warnings"]


@pytest.mark.parametrize("count", [2, 3])
def test_every_process_has_its_part_of_the_tokens(count: int, found: Any) -> None:
    reports = found(count)[0][0]
    for name, case in (CASES if count == 2 else FEW).items():
        told = reports[name]["processes"]
        if name == "by itself":
            assert told is None
            continue
        assert told["count"] == count
        if name in WHOLE:
            assert told["tokens"] is None
            continue
        lengths = case.get("lengths")
        if case["recipe"].get("calibration") == "none":
            assert told["tokens"] == [0] * count
        elif lengths is None or len(lengths) > count:
            assert min(told["tokens"]) > 0
    assert found(2)[0][0]["wanda, even"]["processes"]["tokens"] == [120, 120]


def test_what_is_not_divided_is_said(found: Any) -> None:
    reports = found(2)[0][0]
    for name in CASES:
        said = [note for note in reports[name]["warnings"] if note.startswith("every process ")]
        assert bool(said) == (name in (*WHOLE, "widths")), (name, said)
        assert ("exchange" in reports[name]["stages"]) == (name not in (*WHOLE, "by itself"))


def test_one_that_fails_ends_all_with_its_error(found: Any) -> None:
    first, second = (own["failing"] for own in found(2)[0])
    assert second["broken"] == "ValueError: no more"
    assert first["broken"] == "RankError: process 1 of 2 failed: ValueError: no more"
    assert first["nan"] == second["nan"]
    assert first["nan"].startswith("NumericalError: model.layers.0.self_attn.q_proj")
    assert first["refused"] == second["refused"]
    assert first["refused"].startswith("UserError: targets")


def test_other_work_on_another_process_is_refused(found: Any) -> None:
    first, second = (own["failing"]["unlike"] for own in found(2)[0])
    for text in (first, second):
        assert "`options` differs" in text
        assert "split=false" in text


def test_short_memory_of_one_is_its_own_business(found: Any) -> None:
    """Chunks become smaller there; the report tells where."""
    first, second = (own["failing"] for own in found(2)[0])
    assert first["memory"] == second["memory"] == "done"
    assert first["halved"] == second["halved"]
    notes = [note for note in first["halved"]["warnings"] if "out of memory" in note]
    assert notes
    assert all(note.startswith("process 1: out of memory: chunks reduced to 1") for note in notes)
    assert first["afterwards"] == second["afterwards"] == "done"


KILLED = """
import datetime, os, sys, time, traceback
sys.path.insert(0, {root!r})
import torch
from tests.engine.ranks_cases import CASES, run
from lm_calib_plugin.engine import solve
from lm_calib_plugin.engine.ranks import Ranks
rank, folder = int(sys.argv[1]), sys.argv[3]
torch.distributed.init_process_group(
    "gloo", init_method="file://" + folder + "/group", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=100),
)
real, calls = solve.Solver.solve, []
def solve_or_die(self, *given):
    calls.append(1)
    if rank == 1 and len(calls) == 2:
        {fails}
    return real(self, *given)
solve.Solver.solve = solve_or_die
try:
    run(CASES["sparsegpt"])
except Exception:
    # The process itself stays.
    print(traceback.format_exc(), flush=True)
    if rank == 1:
        time.sleep(60)
"""
FULL = """
        def full(*given):
            raise torch.OutOfMemoryError("no room for a bundle")
        Ranks._carry_one = full
"""


def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, "-c", KILLED.format(root=str(ROOT), fails="os._exit(9)"))
    assert second.wait(200) == 9
    begun = time.monotonic()
    said, _ = first.communicate(timeout=60)
    assert time.monotonic() - begun < 30
    assert "RankError: one of 2 processes went away" in said


def test_a_process_that_fails_while_others_wait_for_its_tensors_ends_them(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, "-c", KILLED.format(root=str(ROOT), fails=FULL.strip()))
    said, _ = first.communicate(timeout=100)
    assert "RankError: one of 2 processes went away" in said
    assert second.poll() is None  # gone from the group, and yet alive
    second.kill()
    assert "no room for a bundle" in second.communicate()[0]


# --- dealing out ---------------------------------------------------------------------------------


def chunked(lengths: Sequence[int], heldout: float, size: int) -> list[Chunk]:
    ids = random_ids(list(lengths))
    return make_chunks(ids, heldout_indices(len(ids), heldout), size, 0)


@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=24),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(1, 9),
    st.integers(1, 6),
    st.booleans(),
)
def test_every_sequence_goes_to_one_process(
    lengths: list[int], heldout: float, size: int, count: int, second_order: bool
) -> None:
    chunks = chunked(lengths, heldout, size)
    parts = [deal(chunks, rank, count, second_order) for rank in range(count)]
    numbers = [n for part in parts for chunk in part.chunks for n in chunk.numbers]
    assert numbers == [n for chunk in chunks for n in chunk.numbers]
    assert parts[0].chunks
    for before, after in pairwise(parts):
        for kind, flag in enumerate((False, True)):
            inside = sum(c.tokens for c in before.chunks if c.heldout == flag)
            assert after.before[kind] == before.before[kind] + inside
    assert {part.total for part in parts} == {whole(chunks).total}
    assert {part.tokens for part in parts} == {
        tuple(sum(c.tokens for c in part.chunks) for part in parts)
    }
    for part in parts:
        for chunk in part.chunks:
            for row, number in enumerate(chunk.numbers):
                length = lengths[number]
                assert torch.equal(chunk.ids[row, :length], random_ids(lengths)[number])
                assert chunk.mask is None or int(chunk.mask[row].sum()) == length


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 8))
def test_the_work_is_even_to_within_a_sequence(nsamples: int, size: int, count: int) -> None:
    chunks = chunked([8] * nsamples, 0.0, size)
    loads = [sum(c.rows for c in deal(chunks, r, count).chunks) for r in range(count)]
    even = nsamples / count
    assert max(loads) <= max((1 + UNEVEN) * even, even + 1)
    if nsamples % (size * count) == 0:
        # Chunks stay as they are: their sums are those of one process.
        assert all(c.rows == size for r in range(count) for c in deal(chunks, r, count).chunks)


def test_owners_have_nearly_even_work() -> None:
    ranks = Ranks(0, 2)
    assert ranks.owners([5, 1, 4, 2]) == [0, 0, 1, 1]
    assert ranks.owners([]) == []
    assert Ranks().owners([3, 2]) == [0, 0]
