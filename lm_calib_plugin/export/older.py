"""Settings as readers of every version look for them.

transformers 5 keeps the rotary settings in one place, ``rope_parameters``. Version 4 does not know
it, takes its own default base of 10,000 and computes something else without a word: ONNX and
OpenVINO exporters still load with version 4 and early 5. And it writes into the settings of a
tokenizer how that was loaded on this machine, which is nobody else's business.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What transformers 5 calls a tokenizer that is all in tokenizer.json, and what version 4 does.
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}
# Arguments of the call that loaded a tokenizer, which version 5 saves with it.
OF_LOADING = ("is_local", "local_files_only")
# What GPT-NeoX called the settings that all models share now.
NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def for_older_readers(folder: Path) -> None:
    """Add the older spelling of settings to the files of a folder.

    Nothing is taken away but what tells how the tokenizer was loaded.
    """
    _edit(folder / "config.json", lambda config: _with_experts(_with_rotary(config)))
    _edit(folder / "tokenizer_config.json", _with_tokenizer)


def _edit(path: Path, change: Any) -> None:
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        changed = change(content)
        if changed != content:
            path.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, and those inside it, with ``rope_theta`` and ``rope_scaling``."""
    found = {k: _with_rotary(v) if isinstance(v, dict) else v for k, v in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return found
    local = rope.get("sliding_attention")
    if isinstance(rope.get("full_attention"), dict):
        # Gemma 3: one base for blocks that see everything, one for those that see a window.
        rope = rope["full_attention"]
        if isinstance(local, dict) and "rope_theta" in local:
            found.setdefault("rope_local_base_freq", local["rope_theta"])
    older = NEOX if config.get("model_type") == "gpt_neox" else {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is not None:
            found.setdefault(older.get(name, name), rope[name])
    if rope.get("rope_type", "default") != "default":
        own = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        found.setdefault("rope_scaling", own)
    return found


def _with_experts(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that also counts experts as Qwen3 and others did."""
    count = config.get("num_local_experts")
    return config if count is None else {"num_experts": count, **config}


def _with_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("tokenizer_class")
    named = {"tokenizer_class": TOKENIZERS.get(kind, kind)} if kind else {}
    return {k: v for k, v in config.items() if k not in OF_LOADING} | named
