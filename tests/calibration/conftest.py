from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lm_calib_plugin.calibration import CalibrationSet, Context, build_calibration
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime

STORIES = Path(__file__).parents[2] / ".." / "shared" / "models" / "stories260K"
WORDS = [f"w{i}" for i in range(60)]
SPECIALS = ["<unk>", "<s>", "</s>"]


def word_tokenizer(start_token: bool = False) -> Any:
    """One id per word, so that a reader of a test can count tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if start_token:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_model(vocab_size: int = 63, seed: int = 0) -> Any:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer()


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LM_CALIB_CACHE", str(tmp_path / "our-cache"))


@pytest.fixture(scope="module")
def stories() -> Any:
    """A trained model when it is at hand, else a random one with a word tokenizer."""
    if STORIES.is_dir():
        return SimpleNamespace(
            tokenizer=AutoTokenizer.from_pretrained(STORIES),
            model=AutoModelForCausalLM.from_pretrained(STORIES).eval(),
        )
    return SimpleNamespace(tokenizer=word_tokenizer(), model=tiny_model().eval())


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts))
    return path


def numbered(count: int, length: int) -> list[str]:
    """Texts of ``length`` words; text i walks through the words from its own place."""
    return [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(length)) for i in range(count)]


def draw(
    calibration: Any, tokenizer: Any, model: Any = None, *, seqlen: int = 8, **fields: Any
) -> CalibrationSet:
    model_id = fields.pop("model_id", "")
    vocab_size = fields.pop("vocab_size", len(tokenizer))
    recipe = Recipe(
        **{"method": "wanda", "sparsity": 0.5, "nsamples": 4, **fields}, calibration=calibration
    )
    return build_calibration(
        recipe,
        tokenizer,
        model,
        seqlen=seqlen,
        model_id=model_id,
        vocab_size=vocab_size,
        runtime=Runtime(progress=False),
    )


def context(tokenizer: Any, **fields: Any) -> Context:
    given = {"count": 4, "seqlen": 8, "seed": 0, "vocab_size": len(tokenizer), **fields}
    return Context(tokenizer=tokenizer, **given)
