"""Where modules compute, as far as it is not where their weights are.

Accelerate leaves weights of modules on the CPU or on a disk, and puts tensors without data (on the
*meta* device) in their place. A hook on each module knows where they are, and where it computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

META = torch.device("meta")


def is_meta(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no data."""
    return tensor.device.type == META.type


def offload_hook(module: nn.Module) -> Any:
    """Return the hook that brings the weights of one module for its forward pass, or None.

    Its ``weights_map`` holds them, by their names in the module; ``offload`` is whether it brings
    them at all; ``execution_device`` is where they go.
    """
    hook = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "weights_map", None) is not None:
            return one
    return None


def execution_device(module: nn.Module) -> torch.device:
    """Return the device on which a module computes: that of its first parameter.

    Where the parameter is away, the one that it is brought to; ``meta`` where nobody brings it.
    """
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if not is_meta(parameter):
                return parameter.device
            hook = offload_hook(owner)
            return META if hook is None else torch.device(hook.execution_device)
    return torch.device("cpu")


def execution_devices(model: nn.Module) -> dict[str, torch.device]:
    """Return where every parameter of a model is used, by name."""
    found = {}
    for path, owner in model.named_modules():
        for name, _ in owner.named_parameters(recurse=False):
            found[f"{path}.{name}" if path else name] = execution_device(owner)
    return found
