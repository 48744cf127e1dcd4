"""Load an exported folder with plain transformers, and compare it with the model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin.errors import CalibError, listed
from lm_calib_plugin.export.quantized import QuantizedLayer

PROBE = (2, 48)  # sequences and random tokens in each
# Relative error of the output of a layer whose input is rounded: transformers does that in the
# dtype of the model, we in float32.
LAYER_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Of the logits, where every weight is the same bit by bit: sums may be taken in another order.
LOGITS_TOLERANCE = 1e-5


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
        that rounds its input, given the same input; ``logits_difference``:
        ``||l' - l|| / ||l||`` on 96 random tokens; ``exact``: whether logits are equal bit by bit.

    Raises
    ------
    CalibError
        When anything differs beyond what is stated here.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    probe = torch.randint(vocabulary, PROBE, generator=generator).to(device)
    rounding = [layer.name for layer in layers if layer.activation is not None]
    seen, expected = watched(model, probe, rounding)
    again = loaded(model, folder, device, trust_remote_code)
    logits = again(probe, use_cache=False).logits
    tensors = _compare_weights(model, again)
    worst = compare_layers(again, seen, next(p.dtype for p in model.parameters()))
    gap = float((logits.float() - expected.float()).norm() / expected.float().norm())
    if not rounding and not gap <= LOGITS_TOLERANCE:
        why = _other_buffer(model, again)
        raise differs(f"logits differ by {gap:.3g} although every weight is the same{why}")
    return {
        "tensors": tensors,
        "layers": worst,
        "logits_difference": gap,
        "exact": bool(torch.equal(logits, expected)),
        "transformers": version("transformers"),
        "compressed-tensors": version_of("compressed-tensors") if layers else None,
    }


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
    try:
        again, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise CalibError(
            f"No memory to load the written folder beside the model ({error}). Export without the "
            "check (--no-check), and compare on another machine."
        ) from error
    except Exception as error:
        raise differs(f"it can not be loaded ({type(error).__name__}: {error})") from error
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong:
        kind, found = next(iter(wrong.items()))
        raise differs(f"{kind.replace('_', ' ')}: {listed(found[:3])}")
    return again.to(device).eval()


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


def _other_buffer(model: nn.Module, again: nn.Module) -> str:
    """Name what differs and is not stored, such as rotary frequencies that were cast."""
    theirs = dict(again.named_buffers())
    for name, ours in model.named_buffers():
        other = theirs.get(name)
        if (
            other is None
            or other.dtype != ours.dtype
            or not torch.equal(ours, other.to(ours.device))
        ):
            return f" ({name} is not that of a loaded model: load it with dtype=, not .to(dtype))"
    return ""


def compare_layers(
    again: nn.Module, seen: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> float:
    """Return the largest relative error of the outputs of layers, given what they received."""
    worst = 0.0
    for name, (x, y) in seen.items():
        found = again.get_submodule(name)(x).float() - y.float()
        error = float(found.norm() / y.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
        worst = max(worst, error)
        if not error <= LAYER_TOLERANCE[dtype]:
            raise differs(
                f"{name} rounds its inputs otherwise (relative error {error:.3g}, allowed "
                f"{LAYER_TOLERANCE[dtype]:g})"
            )
    return worst


def differs(what: str) -> CalibError:
    """Return the error that stops an export."""
    return CalibError(
        "The written folder, loaded with plain transformers, is not the model that was "
        f"compressed: {what}. Nothing was kept."
    )


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
