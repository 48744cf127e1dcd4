"""Load an exported folder with plain transformers, and compare it with the model in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.engine.fingerprint import lasting_buffers, packed_layers
from lm_calib_plugin.errors import CalibError, listed
from lm_calib_plugin.export.architecture import CAST
from lm_calib_plugin.export.quantized import QuantizedLayer
from lm_calib_plugin.storage import version_of

PROBE = (2, 48)  # sequences and random tokens in each
# Relative error of the output of a layer whose input is rounded, computed in float32: in 16 bits
# transformers rounds in the dtype of the model, we in float32, and the levels could not be told.
LAYER_TOLERANCE = 1e-5
# Of the logits, where every weight is the same bit by bit: sums may be taken in another order.
LOGITS_TOLERANCE = 1e-5
SAMPLE = "The quick brown fox jumps over 12 lazy dogs.\n  def f(x): return x + 1  # \u00e9\u4f60"
# What a configuration says of itself, not of the model.
_VOLATILE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def compare_with_folder(
    model: Any, layers: Sequence[QuantizedLayer], folder: Path, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Load a folder as a stranger would, and compare weights, layers and logits.

    Parameters
    ----------
    model
        The compressed model in memory; left as it is.
    layers
        Its quantized layers.
    folder
        The written folder.

    Returns
    -------
    dict
        ``tensors``: how many were compared, ``layers``: the largest relative error of a layer
        that rounds its input, given the same input, in float32; ``logits_difference``:
        ``||l' - l|| / ||l||`` on 96 random tokens, each as its model computes them; ``exact``:
        whether logits are equal bit by bit.

    Raises
    ------
    CalibError
        When anything differs beyond what is stated here.
    """
    try:
        return _compared(model, layers, folder, trust_remote_code)
    except torch.OutOfMemoryError as error:
        raise CalibError(
            f"No memory to load the written folder beside the model ({error}). Export without the "
            "check (--no-check, export_check=false), and compare on another machine."
        ) from error


def _compared(
    model: Any, layers: Sequence[QuantizedLayer], folder: Path, trust_remote_code: bool
) -> dict[str, Any]:
    device = model.get_input_embeddings().weight.device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(vocabulary, PROBE, generator=generator).to(device)
    rounding = [layer for layer in layers if layer.activation is not None]
    kernels = packed_layers(model)
    seen, expected = watched(model, probe, [layer.name for layer in rounding])
    again_here = model(probe, use_cache=False).logits
    again = loaded(model, folder, device, trust_remote_code)
    logits = again(probe, use_cache=False).logits
    tensors = _compare_weights(model, again)
    _compare_buffers(model, again)
    worst = compare_rounding(again, rounding, seen, _biases(model, rounding))
    gap = _distance(logits, expected)
    # Some kernels add up in any order.
    allowed = max(LOGITS_TOLERANCE, 2 * _distance(again_here, expected))
    if not rounding and not kernels and not gap <= allowed:
        raise differs(f"logits differ by {gap:.3g} although every tensor is the same")
    return {
        "tensors": tensors,
        "layers": worst,
        "logits_difference": gap,
        "exact": bool(torch.equal(logits, expected)),
        "transformers": version("transformers"),
        "compressed-tensors": version_of("compressed-tensors") if layers else None,
    }


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _biases(model: nn.Module, layers: Sequence[QuantizedLayer]) -> dict[str, Tensor | None]:
    return {layer.name: model.get_submodule(layer.name).bias for layer in layers}


def found_by_check(check: Mapping[str, Any]) -> str:
    """Return in a few words what a comparison found, for a line or a table."""
    if not check.get("loaded", True):
        return f"not loaded back ({check.get('why')}): {check.get('tensors')} tensors equal on disk"
    return (
        f"loaded back: {check.get('tensors')} tensors equal, logits differ by "
        f"{check.get('logits_difference', float('nan')):.3g}"
    )


def watched(
    model: Any, probe: Tensor, names: Sequence[str]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Return input (before it is rounded) and output of layers, and the logits."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def before(name: str) -> Any:
        return lambda _module, args: seen[name].append(args[0].clone())

    def after(name: str) -> Any:
        return lambda _module, _args, output: seen[name].append(output.clone())

    hooks = []
    for name in names:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(before(name), prepend=True))
        hooks.append(module.register_forward_hook(after(name)))
    try:
        logits = model(probe, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (pair[0], pair[1]) for name, pair in seen.items() if len(pair) == 2}, logits


def loaded(model: Any, folder: Path, device: torch.device, trust_remote_code: bool) -> Any:
    """Return the model that plain transformers makes of a folder.

    Raises
    ------
    CalibError
        When it does not, or finds a tensor too many or too few.
    """
    from transformers import AutoModelForCausalLM

    attention = getattr(model.config, "_attn_implementation", None)
    # Spread over devices like the model that was evaluated.
    spread = getattr(model, "hf_device_map", None)
    try:
        again, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({"device_map": spread} if spread else {}),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise differs(f"it can not be loaded ({type(error).__name__}: {error})") from error
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong:
        kind, found = next(iter(wrong.items()))
        raise differs(f"{kind.replace('_', ' ')}: {listed(found[:3])}")
    return again.eval() if spread else again.to(device).eval()


def _compare_weights(model: nn.Module, again: nn.Module) -> int:
    ours, theirs = model.state_dict(), again.state_dict()
    missing = sorted(ours.keys() - theirs.keys())
    if missing:
        raise differs(f"{len(missing)} tensors are missing ({listed(missing[:3])})")
    for name, tensor in ours.items():
        other = theirs[name]
        if tensor.dtype != other.dtype or not torch.equal(tensor, other.to(tensor.device)):
            raise differs(f"{name} is not what was evaluated")
    return len(ours)


def _compare_buffers(model: nn.Module, again: nn.Module) -> None:
    """Compare what is not stored, such as rotary frequencies."""
    ours = dict(lasting_buffers(model))
    for name, other in lasting_buffers(again):
        mine = ours.get(name)
        if mine is None:
            continue
        if mine.dtype != other.dtype or not torch.equal(mine, other.to(mine.device)):
            raise differs(f"{name} is not that of a loaded model: {CAST}")


def compare_rounding(
    again: nn.Module,
    layers: Sequence[QuantizedLayer],
    seen: Mapping[str, tuple[Tensor, Tensor]],
    biases: Mapping[str, Tensor | None],
) -> float:
    """Return the largest relative error of layers that round their inputs, in float32.

    Each is given what it received in the model that was evaluated. ``seen`` holds that input, not
    yet rounded, ``biases`` the biases of the layers.
    """
    worst = 0.0
    for layer in layers:
        if layer.name not in seen:
            continue
        assert layer.activation is not None
        x, bias = seen[layer.name][0].float(), biases[layer.name]
        rounded = layer.activation(x)
        expected = nn.functional.linear(
            rounded, layer.weight.float(), None if bias is None else bias.float()
        )
        other = copy.deepcopy(again.get_submodule(layer.name)).float()
        error = _distance(other(x), expected)
        worst = max(worst, error)
        if not error <= LAYER_TOLERANCE:
            raise differs(
                f"{layer.name} rounds its inputs otherwise (relative error {error:.3g}, allowed "
                f"{LAYER_TOLERANCE:g})"
            )
    return worst


def compare_beside(model: Any, tokenizer: Any, folder: Path) -> None:
    """Compare configuration, generation settings and tokenizer of a folder with those in memory.

    Raises
    ------
    CalibError
        When one is read back otherwise.
    """
    from transformers import AutoTokenizer, GenerationConfig

    if (folder / "generation_config.json").exists():
        again = GenerationConfig.from_pretrained(folder).to_dict()
        ours = model.generation_config.to_dict()
        wrong = [k for k in ours if k not in _VOLATILE and ours[k] != again.get(k)]
        if wrong:
            raise differs(f"generation_config.json has another {wrong[0]}")
    if tokenizer is None:
        return
    other = AutoTokenizer.from_pretrained(folder)
    facts = {
        "the ids of a text": lambda t: t(SAMPLE).input_ids,
        "the vocabulary": lambda t: t.get_vocab(),
        "special tokens": lambda t: (t.all_special_tokens, t.bos_token_id, t.eos_token_id),
        "the chat template": lambda t: t.chat_template,
    }
    for what, read in facts.items():
        if read(other) != read(tokenizer):
            raise differs(f"the tokenizer differs in {what}")


def differs(what: str) -> CalibError:
    """Return the error that stops an export."""
    return CalibError(
        "The written folder, loaded with plain transformers, is not the model that was "
        f"compressed: {what}. Nothing was kept."
    )
