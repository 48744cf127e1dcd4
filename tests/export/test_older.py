"""Settings stand where older readers look for them, and change nothing for newer ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin.export.older import for_older_readers
from tests.export.strangers import probe
from tests.tiny import make_model, make_tokenizer

PLAIN = {"rope_type": "default", "rope_theta": 3e4}
HALF = {**PLAIN, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.0}
BOTH = {"sliding_attention": PLAIN, "full_attention": LINEAR}
# architecture, rope_parameters, what version 4 of transformers reads
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", PLAIN, {"rope_theta": 3e4}),
    (
        "qwen3",
        LINEAR,
        {"rope_theta": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    (
        "gemma3",
        BOTH,
        {
            "rope_theta": 2e4,
            "rope_local_base_freq": 3e4,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    ("phi3", HALF, {"rope_theta": 3e4, "partial_rotary_factor": 0.5}),
    ("gpt_neox", HALF, {"rotary_emb_base": 3e4, "rotary_pct": 0.5}),
    ("qwen3_moe", PLAIN, {"rope_theta": 3e4, "num_experts": 4}),
]


@pytest.mark.parametrize(("architecture", "rope", "older"), CASES, ids=[c[0] for c in CASES])
def test_old_places_are_filled_and_new_ones_kept(
    architecture: str, rope: dict[str, Any], older: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(architecture, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    for_older_readers(tmp_path)
    after = json.loads((tmp_path / "config.json").read_text())
    assert {name: after[name] for name in older} == older
    assert {name: after[name] for name in before} == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(probe()).logits, model(probe()).logits)


def test_models_without_rotary_settings_stay_as_they_are(tmp_path: Path) -> None:
    make_model("opt").save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    for_older_readers(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_the_tokenizer_has_the_class_that_both_know(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    for_older_readers(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_how_the_tokenizer_was_loaded_is_not_told(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "base")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "base", local_files_only=True)
    loaded.save_pretrained(tmp_path / "out")
    path = tmp_path / "out" / "tokenizer_config.json"
    before = json.loads(path.read_text())
    assert "is_local" in before
    path.write_text(json.dumps(before | {"local_files_only": True}))
    for_older_readers(tmp_path / "out")
    after = json.loads(path.read_text())
    assert before.keys() - after.keys() <= {"is_local", "local_files_only"}
    assert not {"is_local", "local_files_only"} & after.keys()
    text = "the of and to"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == loaded(text)
