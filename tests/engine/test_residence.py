"""Models that accelerate offloads to the CPU or to a disk: the same weights, and nothing lost."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine import residence, solve
from lm_calib_plugin.engine.residence import Ahead, is_offloaded, resident, value_of
from lm_calib_plugin.engine.ties import is_tied, parameters, untie_head, whereabouts
from lm_calib_plugin.errors import NumericalError, UnsupportedModelError, UserError
from tests.tiny import make_model, random_ids, saved_model

QUIET = Runtime(progress=False, calib_batch_size=4)
LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32]
PARTS = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(3)), "model.norm", "lm_head")
MIXED = dict(zip(PARTS, ("cpu", "disk", "cpu", "disk", "disk", "cpu"), strict=True))
MIXED["model.rotary_emb"] = "cpu"


def loaded(folder: str, way: str, offload: Path) -> Any:
    """Return the model of a folder, whole or offloaded in one of the ways that there are."""
    if way in ("load", "load partly"):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            device_map={"": "disk"} if way == "load" else MIXED,
            offload_folder=str(offload),
        )
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if way == "cpu":
        return cpu_offload(model)
    if way == "disk":
        return disk_offload(model, str(offload))
    if way == "mixed":
        return dispatch_model(model, MIXED, offload_dir=str(offload))
    return model


WAYS = ("cpu", "disk", "mixed", "load", "load partly")


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str, str], Any]:
    """Return a maker of models, by architecture and way."""

    def make(name: str, way: str) -> Any:
        folder = tmp_path / name
        if not folder.exists():
            saved_model(folder, name)
        return loaded(str(folder), way, tmp_path / f"offload {way}")

    return make


def calibration() -> CalibrationSet:
    return CalibrationSet.of(random_ids(LENGTHS), seqlen=32)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value().clone() for name, value in parameters(model).items()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.stack(random_ids([16] * 2))).logits
    return found


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


RECIPES = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "gptq, static inputs": {
        "method": "gptq",
        "bits": 4,
        "group_size": 16,
        "act_bits": 8,
        "act_dynamic": False,
    },
    "smoothquant": {"method": "smoothquant", "bits": 8, "group_size": 16},
    "swap_pcg": {"method": "swap_pcg", "sparsity": 0.5},
    "owl": {"method": "owl", "sparsity": 0.5},
    "dense": {"method": "wanda", "sparsity": 0.5, "propagate": "dense"},
    "steps": {"method": "gptq", "bits": 3, "group_size": 16, "true_sequential": True},
    "no data": {"method": "rtn", "bits": 4, "group_size": 16},
    "widths": {"method": "rtn", "bits": "auto:5", "group_size": 16, "calibration": "c4"},
    "rotated": {"method": "rotation", "bits": 4, "group_size": 16},
    "blocks": {"method": "rtn", "rounding": "autoround?iters=3", "bits": 4, "group_size": 16},
    "head": {"method": "wanda", "sparsity": 0.5, "targets": "lm_head+*proj"},
    "keys and values": {"method": "gptq", "bits": 4, "group_size": 16, "kv_bits": 8},
}


def run(model: nn.Module, **fields: Any) -> Any:
    recipe = Recipe(**fields)
    return compress(model, None, recipe, QUIET, calibration() if recipe.terms else None)


@pytest.mark.parametrize("fields", RECIPES.values(), ids=list(RECIPES))
def test_weights_are_those_of_the_model_in_memory(
    made: Callable[[str, str], Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    whole = made("llama", "memory")
    report = run(whole, **fields)
    expected, answers, checkpoint = weights(whole), logits(whole), files(tmp_path / "llama")
    for way in ("cpu", "load partly"):
        model = made("llama", way)
        assert is_offloaded(model)
        offloaded = run(model, **fields)
        found = weights(model)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (way, name)
        torch.testing.assert_close(logits(model), answers, rtol=0, atol=0)
        assert offloaded.weights_digest == report.weights_digest
        assert engine.weights_digest(model) == report.weights_digest
        assert (offloaded.key, offloaded.achieved) == (report.key, report.achieved)
        assert offloaded.table() == report.table()
        assert report.residence is None
        assert offloaded.residence == {"weights": whereabouts(model)}
        assert files(tmp_path / "llama") == checkpoint
        assert is_offloaded(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama_tied", "llama"])
def test_the_head_is_untied_wherever_it_is(
    made: Callable[[str, str], Any], name: str, way: str
) -> None:
    fields = {"method": "sparsegpt", "sparsity": 0.5, "targets": "lm_head+*proj"}
    whole, model = made(name, "memory"), made(name, way)
    tied = name.endswith("tied")
    assert is_tied(whole) == is_tied(model) == tied
    assert engine.parameter_hashes(whole) == engine.parameter_hashes(model)
    assert engine.model_digest(whole) == engine.model_digest(model)
    if tied:
        with pytest.raises(UserError, match="untie=true"):
            run(model, **fields)
    embeddings = value_of(model.get_input_embeddings(), "weight").clone()
    for one in (whole, model):
        run(one, **fields, untie=tied)
    assert not is_tied(model)
    assert engine.parameter_hashes(whole) == engine.parameter_hashes(model)
    assert torch.equal(value_of(model.get_input_embeddings(), "weight"), embeddings)
    assert torch.equal(logits(whole), logits(model))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "opt", "gemma2"])
def test_other_architectures(made: Callable[[str, str], Any], name: str) -> None:
    whole, model = made(name, "memory"), made(name, "load")
    for one in (whole, model):
        run(one, method="sparsegpt", sparsity=0.5)
    assert engine.parameter_hashes(whole) == engine.parameter_hashes(model)
    assert torch.equal(logits(whole), logits(model))


def test_bfloat16(made: Callable[[str, str], Any], tmp_path: Path) -> None:
    """NumPy knows no such numbers; the files of accelerate hold them as integers."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "short")
    whole, model = (loaded(str(tmp_path / "short"), w, tmp_path / "o") for w in ("memory", "disk"))
    for one in (whole, model):
        run(one, method="wanda", sparsity=0.5)
    assert engine.parameter_hashes(whole) == engine.parameter_hashes(model)


def test_buffers_may_be_offloaded_too() -> None:
    whole, model = make_model(), make_model()
    for one in (whole, model):
        one.model.layers[1].register_buffer("kept", torch.ones(3))
    cpu_offload(model, offload_buffers=True)
    assert model.model.layers[1].kept.device.type == "meta"
    for one in (whole, model):
        run(one, method="wanda", sparsity=0.5)
    assert engine.model_digest(whole) == engine.model_digest(model)
    assert model.model.layers[1].kept.device.type == "meta"


@pytest.mark.parametrize("way", WAYS)
def test_a_tied_head_is_tied_again(made: Callable[[str, str], Any], way: str) -> None:
    model = made("llama_tied", way)
    before = engine.model_digest(model)
    tie = untie_head(model)
    assert not is_tied(model)
    assert "lm_head.weight" in parameters(model)
    tie()
    assert is_tied(model)
    assert engine.model_digest(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_an_error_leaves_a_model_that_can_be_used(
    made: Callable[[str, str], Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks done before stay compressed, as in memory; the one in work is dense or half done."""
    model = made("llama", way)
    dense = weights(model)
    compressed = solve.Solver._compressed

    def fail(self: Any, method: Any, layers: Any, *rest: Any) -> Any:
        if layers[0].block == 1:
            raise NumericalError(layers[0].name, "test", "stopped")
        return compressed(self, method, layers, *rest)

    monkeypatch.setattr(solve.Solver, "_compressed", fail)
    with pytest.raises(NumericalError, match=r"layers\.1.*stopped"):
        run(model, method="wanda", sparsity=0.5)
    assert is_offloaded(model)
    found = weights(model)
    for name, weight in dense.items():
        done = "layers.0" in name and name.endswith("proj.weight")
        assert torch.equal(found[name], weight) != done
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("way", WAYS)
def test_residence(made: Callable[[str, str], Any], way: str) -> None:
    model = made("llama", way)
    block, dense = model.model.layers[1], weights(model)
    with resident(block):
        assert all(p.device.type == "cpu" for p in block.parameters())
        held = [p.data_ptr() for p in block.parameters()]
        with resident(block), torch.no_grad():
            block.self_attn.q_proj.weight.data.mul_(2)
            logits(model)
        assert [p.data_ptr() for p in block.parameters()] == held
    found = weights(model)
    for name, weight in dense.items():
        factor = 2 if name == "model.layers.1.self_attn.q_proj.weight" else 1
        assert torch.equal(found[name], weight * factor)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("way", ["cpu", "disk", "load"])
def test_weights_may_be_fetched_before(
    made: Callable[[str, str], Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changes, and the next block is on its way while one is in work."""
    whole, model = made("llama", "memory"), made("llama", way)
    taken: list[bool] = []

    class Counted(Ahead):
        def __init__(self) -> None:
            super().__init__(everywhere=True)

        def take(self, owner: nn.Module, name: str) -> torch.Tensor | None:
            found = super().take(owner, name)
            taken.append(found is not None)
            return found

    monkeypatch.setattr(residence, "Ahead", Counted)
    for one in (whole, model):
        run(one, method="owl", sparsity=0.5)
    assert engine.parameter_hashes(whole) == engine.parameter_hashes(model)
    # Two passes over three blocks of nine tensors; nobody knew of the first blocks.
    assert (len(taken), sum(taken)) == (2 * 3 * 9, 2 * 2 * 9)


def test_what_did_not_change_is_not_written(made: Callable[[str, str], Any]) -> None:
    model = made("llama", "load")
    index = dict(model.lm_head._hf_hook.weights_map.dataset.index)
    with resident(model):
        pass
    with resident(model, changes=False), torch.no_grad():
        model.lm_head.weight.zero_()
    assert model.lm_head._hf_hook.weights_map.dataset.index == index
    assert bool(value_of(model.lm_head, "weight").any())


def test_changed_weights_go_with_the_model(made: Callable[[str, str], Any], tmp_path: Path) -> None:
    """Files of a run are deleted with its model; those of accelerate stay as they are."""
    offload = tmp_path / "offload disk"
    dense = weights(made("llama", "disk"))
    before = files(offload)
    model = made("llama", "disk")
    for _ in range(2):  # changed twice: the first files make way
        run(model, method="wanda", sparsity=0.5)
    own = [p for p in offload.rglob("*.safetensors")]
    assert len(own) == 21
    assert {n: d for n, d in files(offload).items() if n in before} == before
    del model
    gc.collect()
    assert files(offload) == before
    again = weights(made("llama", "disk"))
    assert all(torch.equal(again[name], weight) for name, weight in dense.items())


def test_where_weights_are(made: Callable[[str, str], Any]) -> None:
    total = sum(p.numel() * 4 for p in make_model().parameters())
    assert whereabouts(made("llama", "memory")) == {"cpu": total}
    assert whereabouts(made("llama", "disk")) == {"disk": total}
    shared = sum(p.numel() * 4 for p in make_model("llama_tied").parameters())
    assert whereabouts(made("llama_tied", "load")) == {"disk": shared}
    found = whereabouts(made("llama", "load partly"))
    assert set(found) == {"cpu", "disk"}
    assert sum(found.values()) == total


def test_weights_that_are_nowhere_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = make_model()
    with pytest.raises(UnsupportedModelError, match=r"no data .*from_pretrained"):
        engine.check_supported(empty)
    folder = saved_model(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"})
    with pytest.raises(UserError, match="offload_folder"):
        engine.check_supported(model)
    whole = cpu_offload(make_model(), preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(UnsupportedModelError, match="preload_module_classes"):
        engine.check_supported(whole)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does"
)
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Of 16 or 48 blocks of 4 MiB, what eight of them take: weights and their float32 copies,
    statistics, and the activations of a chunk."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.streamed", str(tmp_path), "wanda", "16", "48"],
        cwd=Path(__file__).parents[2],
        # Freed memory goes back to the system, so that the peak is that of what is in use.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    block = 4 * 2**20
    shallow, deep = json.loads(done.stdout.splitlines()[-1])
    assert deep < 8 * block
    assert deep < shallow + 2 * block
