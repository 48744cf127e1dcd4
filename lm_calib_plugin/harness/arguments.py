"""Harness arguments: which are ours, which go to HFLM, and which can not work."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe, unknown_argument
from lm_calib_plugin.recipe_file import FILE_ARGUMENT
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS

OURS = (*(name for name in Recipe.model_fields), *RUNTIME_ARGUMENTS, FILE_ARGUMENT)
HFLM_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(HFLM.__init__).parameters.items()
    if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
)
# HFLM hands every other argument to from_pretrained; these are the ones that make sense there.
LOADING_ARGUMENTS = (
    "attn_implementation", "cache_dir", "code_revision", "experts_implementation",
    "force_download", "local_files_only", "low_cpu_mem_usage", "proxies", "token",
    "use_safetensors", "variant",
)  # fmt: skip
TEXTS = ("pretrained", "tokenizer", "revision", "peft", "delta")  # 007 and 1e5 are names there
HARNESS_DEFAULTS = {"batch_size": "1", "device": "cuda:0"}
REFUSED = {
    "autogptq": "a checkpoint that is already quantized",
    "gptqmodel": "a checkpoint that is already quantized",
    "gguf_file": "a GGUF file; convert it to a Hugging Face folder first",
    "tp_plan": "tensor parallel weights; use parallelize=True",
    "quantization_config": "another quantization; choose method, bits and group_size here",
    "load_in_4bit": "another quantization; choose method, bits and group_size here",
    "load_in_8bit": "another quantization; choose method, bits and group_size here",
    "device_map": "device_map, which HFLM drops; use parallelize=True",
}


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split harness arguments into ours and those of HFLM.

    Raises
    ------
    UserError
        For a name that nobody knows, with the nearest one, and for what can not be combined with
        compression.
    """
    for name, value in arguments.items():
        if name in REFUSED and value not in (None, False):
            raise UserError(name, f"compression cannot start from {REFUSED[name]}", fix="drop it")
        if name not in (*OURS, *HFLM_ARGUMENTS, *LOADING_ARGUMENTS, *REFUSED):
            raise unknown_argument(name, (*OURS, *HFLM_ARGUMENTS, *LOADING_ARGUMENTS))
    if arguments.get("backend") == "seq2seq":
        raise UserError("backend", "got seq2seq", "decoder-only models (causal)", "drop it")
    ours = {k: v for k, v in arguments.items() if k in OURS}
    theirs = {k: v for k, v in arguments.items() if k not in OURS and k not in REFUSED}
    return ours, theirs


def merge_harness(arguments: Mapping[str, Any], harness: Mapping[str, Any]) -> dict[str, Any]:
    """Merge ``model_args`` with what the harness passes beside them (batch size, device).

    What stands in ``model_args`` wins over the harness' own defaults.
    """
    merged = dict(arguments)
    for name, value in harness.items():
        default = str(value) == HARNESS_DEFAULTS.get(name)
        if value is None or (default and merged.get(name) is not None):
            continue
        if merged.get(name) is not None and str(merged[name]) != str(value):
            raise UserError(
                name,
                f"got {merged[name]!r} in model_args and {value!r} beside them",
                fix=f"give {name} once, as --{name}",
            )
        merged[name] = value
    return merged


def parse_argument_text(text: str) -> dict[str, Any]:
    """Parse ``key=value,key=value`` (or JSON) as given to ``simple_evaluate(model_args="...")``.

    Commas inside brackets and quotes do not split; values are read as numbers, booleans, lists or
    JSON where they look like one, else kept as text.
    """
    text = text.strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(
                "model_args", f"not JSON: {error}", 'for instance {"method": "wanda"}'
            ) from None
    found: dict[str, Any] = {}
    for part in _split(text):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError("model_args", f"got {part!r}", "key=value pairs joined by commas")
        name, value = name.strip(), value.strip()
        found[name] = value if name in TEXTS else _value(value)
    return found


def _split(text: str) -> list[str]:
    parts, depth, quote, current = [], 0, "", ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and (depth or current.endswith("=")):
            # Elsewhere it is an apostrophe.
            quote = char
        elif char in "[{(":
            depth += 1
        elif char in "]})":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append(current)
            current = ""
        else:
            current += char
    return [p for p in (*parts, current) if p.strip()]


def _value(text: str) -> Any:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
