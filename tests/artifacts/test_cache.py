"""A model that is loaded is the one that was compressed: every bit, every word of the report."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, compression, engine, packed
from lm_calib_plugin.artifacts import cache
from lm_calib_plugin.artifacts.changes import Dense, NotKeptError, find_changes
from lm_calib_plugin.artifacts.shelf import entries
from lm_calib_plugin.execution import available
from lm_calib_plugin.storage import canonical_json
from tests.tiny import make_model, random_ids

LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32, 28, 17]
GROUPS = {"group_size": 16}


def calibration(seed: int = 1) -> CalibrationSet:
    return CalibrationSet.of(random_ids(LENGTHS, seed), seqlen=32)


def run(folder: Path | bool, given: dict[str, Any], name: str = "llama", **changes: Any) -> Any:
    """Return a model made anew and compressed, and its report."""
    model = make_model(name, **changes)
    runtime = Runtime(progress=False, cache=folder if folder is False else str(folder))
    return model, compress(model, None, Recipe(**given), runtime, calibration())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(random_ids([16], seed=5)[0][None]).logits


def alike(found: Any, expected: Any) -> None:
    """Hold one model and its report against another, bit for bit."""
    (one, a), (two, b) = found, expected
    left, right = one.state_dict(), two.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name
    flags = [(n, p.requires_grad) for n, p in one.named_parameters()]
    assert flags == [(n, p.requires_grad) for n, p in two.named_parameters()]
    assert one.config.to_dict() == two.config.to_dict()
    assert [type(m) for m in one.modules()] == [type(m) for m in two.modules()]
    assert torch.equal(logits(one), logits(two))
    assert canonical_json(a.table()) == canonical_json(b.table())
    assert a.report_sha256 == b.report_sha256
    same = "key recipe calibration achieved warnings weights_digest model_digest left_dense"
    for field in same.split():
        assert getattr(a, field) == getattr(b, field), field
    assert list(a.grids) == list(b.grids)
    for name, grid in a.grids.items():
        other = b.grids[name]
        assert type(grid) is type(other)
        for field in dataclasses.fields(grid):
            mine, its = getattr(grid, field.name), getattr(other, field.name)
            assert torch.equal(mine, its) if torch.is_tensor(mine) else mine == its


FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "magnitude": ({"method": "magnitude", "sparsity": 0.5}, "llama"),
    "wanda": ({"method": "wanda", "sparsity": 0.5}, "llama"),
    "n_of_m": ({"method": "wanda", "pattern": "2:4"}, "gpt2"),
    "sparsegpt": ({"method": "sparsegpt", "sparsity": 0.6}, "bloom"),
    "allocation": ({"method": "swap_pcg", "sparsity": 0.6, "allocation": "owl"}, "llama"),
    "listed": ({"method": "wanda", "allocation": "list?fractions=0.2+0.5+0.6"}, "llama"),
    "correction": ({"method": "sparsegpt", "sparsity": 0.5, "correction": 0.5}, "llama"),
    "bias": ({"method": "wanda", "sparsity": 0.5, "update": "bias"}, "opt"),
    "gptq": ({"method": "gptq", "bits": 3, **GROUPS}, "llama"),
    "overrides": (
        {"method": "gptq", "bits": 3, **GROUPS, "overrides": {"*down_proj": {"bits": 4}}},
        "llama",
    ),
    "awq": ({"method": "awq", "bits": 4, **GROUPS}, "llama"),
    "smoothquant": ({"method": "smoothquant", "scheme": "W8A8_static"}, "opt"),
    "rotation": ({"method": "rotation", "bits": 4, **GROUPS}, "llama_tied"),
    "fp8": ({"method": "rtn", "scheme": "FP8"}, "llama"),
    "nvfp4": ({"method": "rtn", "scheme": "NVFP4"}, "llama"),
    "hqq": ({"method": "hqq", "bits": 3, "symmetric": False, **GROUPS}, "llama"),
    "auto": ({"method": "gptq", "bits": "auto:4", **GROUPS, "heldout": 0.25}, "llama"),
    "kv": ({"method": "rtn", "bits": 16, "kv_bits": 4}, "llama"),
    "joint": ({"method": "wanda+gptq", "sparsity": 0.5, "bits": 4, **GROUPS}, "llama"),
    "depth": ({"method": "shortgpt", "blocks": 1}, "gemma3"),
    "depth_term": ({"method": "depth_l2", "blocks": 1, "update": "lowrank?rank=2"}, "llama"),
    "attention": ({"method": "depth_l2", "blocks": 2, "sublayer": "attention"}, "llama"),
    "mlp_term": (
        {"method": "depth_l1", "blocks": 1, "sublayer": "mlp", "update": "mean"},
        "opt",
    ),
    "flap": ({"method": "flap", "sparsity": 0.3}, "llama"),
    "head": (
        {
            "method": "rtn",
            "bits": 4,
            "group_size": -1,
            "targets": "*proj+lm_head",
            "untie": True,
        },
        "llama_tied",
    ),
    "experts": ({"method": "gptq", "bits": 4, "group_size": 8}, "mixtral"),
    "nothing": ({"method": "magnitude", "sparsity": 0}, "llama"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hit_is_a_miss_bit_for_bit(family: str, tmp_path: Path) -> None:
    given, name = FAMILIES[family]
    estimates = []

    def estimated(shelf: Path, needed: int) -> None:
        estimates.append(needed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "check_room", estimated)
        plain = run(False, given, name)
        assert not estimates
        first = run(tmp_path, given, name)
    second = run(tmp_path, given, name)
    assert plain[1].cache is None
    assert first[1].cache["hit"] is False, first[1].warnings
    assert second[1].cache["hit"] is True, second[1].warnings
    alike(first, plain)
    alike(second, plain)
    (entry,) = entries(tmp_path)
    assert first[1].cache["artifact"] == second[1].cache["artifact"] == str(entry.folder)
    assert first[1].cache["bytes"] == entry.bytes <= min(estimates)
    assert "loaded; compressing took" in second[1].line()
    assert second[1].summary()["cache"]["seconds_saved"] > 0
    assert entry.record is not None
    assert entry.record["key"] == plain[1].key
    assert entry.record["weights_digest"] == plain[1].weights_digest


def test_only_what_changed_is_kept(tmp_path: Path) -> None:
    """A tied weight once, embeddings and norms not at all."""
    run(tmp_path, FAMILIES["wanda"][0])
    (entry,) = entries(tmp_path)
    assert entry.record is not None
    changed = entry.record["changes"]["changed"]
    assert len(changed) == 21
    assert all(name.endswith("proj.weight") for name in changed)


def test_weights_of_16_bits_and_a_second_device_dtype(tmp_path: Path) -> None:
    def half() -> Any:
        model = make_model().to(torch.bfloat16)
        runtime = Runtime(progress=False, cache=str(tmp_path))
        recipe = Recipe(method="gptq", bits=4, group_size=16)
        return model, compress(model, None, recipe, runtime, calibration())

    first, second = half(), half()
    assert second[1].cache["hit"]
    alike(second, first)


def test_how_the_work_is_done_is_no_part_of_the_request(tmp_path: Path) -> None:
    given = FAMILIES["gptq"][0]
    first = run(tmp_path, given)
    runtime = Runtime(
        progress=False,
        calib_batch_size=len(LENGTHS) + 5,
        eval_tokens=64,
        report_dir=str(tmp_path / "reports"),
        cache=str(tmp_path),
    )
    model = make_model()
    report = compress(model, None, Recipe(**given), runtime, calibration())
    assert report.cache is not None
    assert report.cache["hit"]
    alike((model, report), first)


@pytest.mark.skipif(
    "scheme=W8A8" not in available("cpu", torch.float32), reason="no int8 kernel on this CPU"
)
def test_kernels_are_made_from_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "pack", functools.partial(packed.pack, force=True))
    given = {"method": "rtn", "scheme": "W8A8"}
    _, simulated = run(tmp_path, given)
    model, found = run(tmp_path, {**given, "execution": "packed"})
    twin, expected = run(False, {**given, "execution": "packed"})
    assert found.cache["hit"]
    assert found.execution["layers_packed"] == expected.execution["layers_packed"] == 21
    assert found.key == expected.key != simulated.key
    assert found.weights_digest == expected.weights_digest == simulated.weights_digest
    assert torch.equal(logits(model), logits(twin))
    assert len(entries(tmp_path)) == 1


def test_another_model_is_another_request(tmp_path: Path) -> None:
    given = FAMILIES["wanda"][0]
    run(tmp_path, given)
    _, other = run(tmp_path, given, seed=1)
    assert other.cache["hit"] is False
    assert len(entries(tmp_path)) == 2


def test_what_can_not_be_told_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of another package may do anything; the run is not lost, and says why."""
    original = compression.work_on

    def more(job: Any) -> Any:
        done = original(job)
        job.model.model.layers[0].extra = nn.Linear(2, 2)
        return done

    monkeypatch.setattr(compression, "work_on", more)
    for _ in range(2):
        _, report = run(tmp_path, FAMILIES["wanda"][0])
        assert report.cache == {"hit": False, "artifact": None}
        (note,) = [w for w in report.warnings if w.startswith("cache")]
        assert note == "cache: not kept, because model.layers.0.extra (Linear) is new"
    assert entries(tmp_path) == []


@pytest.mark.parametrize("change", ["shape", "gone", "new", "block"])
def test_changes_without_words_are_named(change: str) -> None:
    model = make_model()
    blocks = engine.find_blocks(model)
    dense = Dense.of(model, blocks, engine.parameter_hashes(model))
    attention = model.model.layers[0].self_attn
    if change == "shape":
        attention.q_proj.weight = nn.Parameter(torch.zeros(4, 32))
    elif change == "gone":
        del attention.q_proj.weight
    elif change == "new":
        attention.gain = nn.Parameter(torch.zeros(4))
    else:
        model.model.layers[0] = make_model(seed=1).model.layers[0]
    with pytest.raises(NotKeptError, match=r"model\.layers\.0|block was replaced"):
        find_changes(dense, model, blocks, engine.parameter_hashes(model))
