"""Models larger than what they take of a CUDA device; hidden states that wait on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine import passes
from tests.engine.test_walk import calibration
from tests.tiny import VOCAB, make_model, random_ids, saved_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUIET = Runtime(progress=False, calib_batch_size=4)
HIDDEN = 512
BLOCK = 4 * 16 * HIDDEN**2
RECIPES = [
    {"method": "wanda", "sparsity": 0.5},
    {"method": "sparsegpt", "sparsity": 0.5, "propagate": "dense"},
    {"method": "swap_pcg", "sparsity": 0.5},
    {"method": "gptq", "bits": 4, "group_size": 16, "act_bits": 8, "act_dynamic": False},
    {"method": "owl", "sparsity": 0.5},
    {"method": "rtn", "rounding": "autoround?iters=2", "bits": 4, "group_size": 16},
]


def run(model: Any, fields: dict[str, Any]) -> Any:
    return compress(model, None, Recipe(**fields), QUIET, calibration())


def placed(folder: str, home: str, tmp_path: Path) -> Any:
    """Return a model whose blocks are at home on the CPU or a disk, and the rest on the device."""
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        device_map={**rest, "model.layers": home},
        offload_folder=str(tmp_path / "offload"),
    )


@pytest.mark.parametrize("fields", RECIPES, ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("home", ["cpu", "disk"])
def test_weights_are_those_of_the_model_on_the_device(
    fields: dict[str, Any], home: str, tmp_path: Path
) -> None:
    folder = saved_model(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0})
    expected = run(whole, fields)
    model = placed(folder, home, tmp_path)
    found = run(model, fields)
    assert engine.parameter_hashes(model) == engine.parameter_hashes(whole)
    assert (found.key, found.weights_digest) == (expected.key, expected.weights_digest)
    assert set(found.residence["weights"]) == {home, "cuda:0"}
    assert found.residence["hidden_states"] == "host"
    ids = torch.stack(random_ids([16] * 2)).to("cuda")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=0)


def test_everything_may_be_away() -> None:
    whole, model = make_model().to("cuda"), cpu_offload(make_model(), torch.device("cuda", 0))
    for one in (whole, model):
        run(one, {"method": "sparsegpt", "sparsity": 0.5})
    assert engine.parameter_hashes(model) == engine.parameter_hashes(whole)


@pytest.mark.parametrize("fields", RECIPES, ids=lambda f: "-".join(map(str, f.values())))
def test_hidden_states_on_the_host(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model().to("cuda")
    assert run(plain, fields).residence is None
    monkeypatch.setattr(passes, "waits_on_host", lambda *_: True)
    model = make_model().to("cuda")
    assert run(model, fields).residence == {"hidden_states": "host"}
    assert engine.parameter_hashes(model) == engine.parameter_hashes(plain)


def peak(folder: str, tmp_path: Path) -> int:
    """Return how many bytes of the device one compression takes beyond what it begins with."""
    model = placed(folder, "disk", tmp_path)
    data = CalibrationSet.of(random_ids([32] * 16), seqlen=32)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compress(model, None, Recipe(method="wanda", sparsity=0.5), QUIET, data)
    return torch.cuda.max_memory_allocated() - before


def test_the_device_holds_one_block_whatever_the_depth(tmp_path: Path) -> None:
    """Weights of a block, float32 copies of one unit of its layers and what sorts them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_key_value_heads": 4}
    found = []
    for depth in (2, 4, 16):
        changes = {**sizes, "num_hidden_layers": depth, "vocab_size": VOCAB}
        folder = saved_model(tmp_path / f"{depth}", **changes)
        found.append(peak(folder, tmp_path))
    # The first run brings what libraries take once.
    assert found[2] < 5 * BLOCK
    assert abs(found[2] - found[1]) < BLOCK // 4
