"""Hidden states that wait on the host: the same results, one set of them, nothing kept alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_calib_plugin import Recipe, compress, engine
from lm_calib_plugin.engine import passes, walk
from lm_calib_plugin.engine.batches import Chunk, make_chunks
from lm_calib_plugin.engine.hidden import HiddenStates, waits_on_host
from lm_calib_plugin.engine.passes import BlockPass
from lm_calib_plugin.engine.watched import Watched
from tests.engine.test_walk import QUIET, calibration, compressed, flat
from tests.tiny import make_model, random_ids

CPU = torch.device("cpu")


class Elsewhere(HiddenStates):
    """What is put away is a copy in memory of its own, as on a host beside an accelerator."""

    def __init__(self, device: torch.device, on_host: bool = False) -> None:
        super().__init__(device, on_host=True)
        self.written: set[int] = set()

    def put(self, hidden: Tensor, into: Tensor | None = None) -> Tensor:
        if into is None or into.shape != hidden.shape:
            into = torch.empty_like(hidden)
        self.written.add(into.data_ptr())
        return into.copy_(hidden)

    def _get(self, hidden: Tensor | None) -> Tensor | None:
        return None if hidden is None else hidden.clone()


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "wanda", "sparsity": 0.5},
        {"method": "sparsegpt", "sparsity": 0.5, "propagate": "dense"},
        {"method": "swap_pcg", "sparsity": 0.5},
        {"method": "gptq", "bits": 4, "group_size": 16, "act_bits": 8, "act_dynamic": False},
        {"method": "sparsegpt", "sparsity": 0.5, "correction": 0.5, "true_sequential": True},
        {"method": "owl", "sparsity": 0.5},
        {"method": "rtn", "rounding": "autoround?iters=2", "bits": 4, "group_size": 16},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_weights_do_not_depend_on_where_they_wait(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compressed(Recipe(**fields))
    monkeypatch.setattr(passes, "HiddenStates", Elsewhere)
    away = make_model()
    report = compress(away, None, Recipe(**fields), QUIET, calibration())
    assert torch.equal(flat(away), flat(plain))
    assert report.residence == {"hidden_states": "host"}


def test_one_set_of_them_is_written_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Elsewhere] = []

    def make(*given: Any) -> Elsewhere:
        made.append(Elsewhere(*given))
        return made[-1]

    monkeypatch.setattr(passes, "HiddenStates", make)
    compressed(Recipe(method="wanda", sparsity=0.5))
    assert len(made[-1].written) == 4  # of 4 chunks, in 3 blocks


def test_short_memory_halves_chunks_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that fails in the middle goes on with what was done, and from what was not."""
    monkeypatch.setattr(passes, "HiddenStates", Elsewhere)
    plain, failed, replay = compressed(Recipe(method="wanda", sparsity=0.5)), [], passes.replay

    def short(block: nn.Module, call: Any, hidden: Tensor) -> Tensor:
        if len(failed) < 2 and hidden.shape[0] > 1:
            failed.append(hidden.shape)
            if len(failed) == 2:
                raise torch.OutOfMemoryError("test")
        return replay(block, call, hidden)

    monkeypatch.setattr(passes, "replay", short)
    model = make_model()
    compress(model, None, Recipe(method="wanda", sparsity=0.5), QUIET, calibration())
    assert len(failed) == 2
    close = (flat(model) == flat(plain)).float().mean()
    assert close > 0.99


def test_chunks_come_in_order_with_all_they_have() -> None:
    chunks = make_chunks(random_ids([5, 5, 3]), [2], 1, 0)
    for number, chunk in enumerate(chunks):
        chunk.hidden = torch.full((1, 5, 2), float(number))
    chunks[0].dense = torch.ones(1, 5, 2)
    for on_host in (False, True):
        seen = list(HiddenStates(CPU, on_host).coming(chunks, dense=True))
        assert [waiting for waiting, _ in seen] == chunks
        for waiting, here in seen:
            assert torch.equal(here.hidden, waiting.hidden)
            assert (here.dense is None) == (waiting.dense is None)
            assert (here.heldout, here.numbers) == (waiting.heldout, waiting.numbers)
        alone = list(HiddenStates(CPU, on_host).coming(chunks, dense=False))
        assert [here.dense for _, here in alone] == [None] * 3
    assert list(HiddenStates(CPU).coming([], dense=True)) == []


def test_on_a_cpu_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, like = [Chunk(torch.zeros(1, 8, dtype=torch.long), None, False)], torch.zeros(1, 2, 4)
    assert not waits_on_host(make_model(), chunks, like, CPU)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (4 * 8 * 4 * 4, 0))
    assert not waits_on_host(make_model(), chunks, like, cuda)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (4 * 8 * 4 * 4 - 1, 0))
    assert waits_on_host(make_model(), chunks, like, cuda)


def test_statistics_of_a_block_are_gone_when_the_next_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[weakref.ref[Watched]] = []
    left: list[int] = []
    empty, block = walk._Walk._empty, walk._Walk._block

    def count(self: Any, *given: Any, **named: Any) -> None:
        gc.collect()
        left.append(sum(seen() is not None for seen in alive))
        block(self, *given, **named)

    def made(self: Any, layer: Any) -> Watched:
        found = empty(self, layer)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(walk._Walk, "_empty", made)
    monkeypatch.setattr(walk._Walk, "_block", count)
    compressed(Recipe(method="swap_pcg", sparsity=0.5))
    assert len(alive) == 12
    assert left == [0, 0, 0]


def test_arguments_of_blocks_are_shared() -> None:
    """Rotary tables are those of one length, masks those of one pattern of pads."""
    model = make_model()
    chunks = make_chunks(random_ids([8] * 6), [], 2, 0)
    work = BlockPass(model, engine.find_blocks(model), chunks, CPU)
    work.capture()
    tensors: set[int] = set()
    for chunk in chunks:
        for call in chunk.calls:
            for value in [*call.args, *call.kwargs.values()]:
                parts = value if isinstance(value, tuple) else (value,)
                tensors |= {id(part) for part in parts if isinstance(part, Tensor)}
    one = {
        id(part)
        for value in chunks[0].calls[0].kwargs.values()
        for part in (value if isinstance(value, tuple) else (value,))
        if isinstance(part, Tensor)
    }
    assert tensors == one
