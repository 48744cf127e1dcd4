"""Which models can be compressed, and where their decoder blocks are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lm_calib_plugin.engine.residence import check_residence
from lm_calib_plugin.errors import UnsupportedModelError, listed

RECURRENT = ("mamba", "rwkv", "jamba", "zamba", "bamba", "recurrent_gemma", "xlstm", "falcon_h1")


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model and the dotted path of the list that holds them."""

    path: str
    modules: nn.ModuleList

    def __len__(self) -> int:
        return len(self.modules)


def check_config(config: Any, name: str) -> None:
    """Refuse, by name and with the way out, a kind of model that can not be compressed here.

    Only the configuration is needed, so this runs before any weight is loaded.

    Raises
    ------
    UnsupportedModelError
        For encoder-decoders, recurrent models, models that are already quantized, and models that
        share keys and values between blocks.
    """
    kind = str(getattr(config, "model_type", "")).lower()
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            "model", f"{name} is an encoder-decoder", "decoder-only causal language models"
        )
    if any(word in kind for word in RECURRENT):
        raise UnsupportedModelError(
            "model",
            f"{name} ({kind}) has recurrent blocks",
            "decoder-only transformers whose blocks can be replayed one by one",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "model",
            f"{name} is already quantized",
            fix="load the full-precision checkpoint it was made from",
        )
    if getattr(text_config(config), "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            "model",
            f"{name} shares keys and values between blocks",
            "models whose blocks can be replayed one by one",
        )


def check_supported(model: nn.Module) -> None:
    """Refuse a loaded model that can not be compressed here; see also :func:`check_config`.

    Raises
    ------
    UnsupportedModelError
        For adapters not merged and weights that are nowhere, too.
    UserError
        For weights on a disk without a folder to put compressed ones in.
    """
    name = type(model).__name__
    if hasattr(model, "peft_config") and hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            "model",
            f"{name} carries adapters that are not merged",
            fix="call merge_and_unload() first; through the harness, peft=... is merged by itself",
        )
    check_config(getattr(model, "config", None), name)
    check_residence(model)


def text_config(config: Any) -> Any:
    """Return the configuration of the language model inside a composite one."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def find_blocks(model: nn.Module, path: str | None = None) -> Blocks:
    """Find the list of decoder blocks.

    Taken is the outermost ``nn.ModuleList`` of ``config.num_hidden_layers`` entries that holds the
    most parameters; ``path`` names another one.

    Raises
    ------
    UnsupportedModelError
        When there is none, with the lists that were seen.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if path is not None:
        if path in lists:
            return Blocks(path, lists[path])
        raise UnsupportedModelError(
            "block_path", f"no list of blocks at `{path}`", f"lists in this model: {listed(lists)}"
        )
    depth = getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", None)
    outermost = [
        n for n in lists if not any(n.startswith(other + ".") for other in lists if other != n)
    ]
    fitting = [n for n in outermost if depth is None or len(lists[n]) == depth]
    if not fitting:
        raise UnsupportedModelError(
            "model",
            f"cannot find repeated blocks in {type(model).__name__}",
            f"lists seen: {listed(lists) or 'none'}",
            "give block_path=path.to.layers",
        )
    best = max(fitting, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    return Blocks(best, lists[best])
