"""Tiny random models of every architecture, and a tokenizer for them, made in memory."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 97
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_BASE, "num_key_value_heads": 2}
_OLD = {"vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SLIDING = {"sliding_window": 8, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name -> (config class, arguments, linear layers of one block)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("LlamaConfig", _GQA, 7),
    "llama_tied": ("LlamaConfig", {**_GQA, "tie_word_embeddings": True}, 7),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 8}, 7),
    "qwen2": ("Qwen2Config", _GQA, 7),
    "qwen3": ("Qwen3Config", {**_GQA, "head_dim": 8}, 7),
    "gemma2": ("Gemma2Config", {**_GQA, **_SLIDING}, 7),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GQA,
            **_SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        7,
    ),
    "phi3": ("Phi3Config", {**_GQA, **_TOKENS}, 4),
    "opt": (
        "OPTConfig",
        {
            **_OLD,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        6,
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 48,
            **_TOKENS,
        },
        4,
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_BASE, **_TOKENS}, 4),
    "falcon": (
        "FalconConfig",
        {
            **_OLD,
            "num_hidden_layers": 3,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            **_TOKENS,
        },
        4,
    ),
    "falcon_alibi": (
        "FalconConfig",
        {
            **_OLD,
            "num_hidden_layers": 3,
            "alibi": True,
            "bias": True,
            "parallel_attn": False,
            "multi_query": False,
            "new_decoder_architecture": False,
            **_TOKENS,
        },
        4,
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 3, "n_head": 4, **_TOKENS},
        4,
    ),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}, 12),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 24},
        15,
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**_GQA, **_EXPERTS, "head_dim": 8}, 12),
}


def make_model(name: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """Return a random model of an architecture, in inference mode, float32."""
    config_class, arguments, _ = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Cast the weights of a model as loading it in a dtype does: rotary frequencies stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer over ``VOCAB`` entries: specials, letters, common words."""
    words = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are"]
    words += ["as", "with", "his", "they", "at", "be", "this", "from"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *words, *letters, *"0123456789.,?!:;-()'\"/"]
    pieces += [f"w{i}" for i in range(VOCAB - len(pieces))]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def random_ids(lengths: list[int], seed: int = 1) -> list[torch.Tensor]:
    """Return one sequence of random ids for every length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def saved_model(folder: Any, name: str = "llama", **changes: Any) -> str:
    """Save a tiny model and its tokenizer in a folder; return the folder as text."""
    make_model(name, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
