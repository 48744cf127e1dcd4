"""Compress while transformers loads: ``from_pretrained(M, quantization_config=...)``.

The library's own door for out-of-tree quantizers is used. Weights load as usual; then the model
is compressed, and every trace of the door is taken off again, so that an ordinary model comes out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lm_calib_plugin.checks import check_calibration
from lm_calib_plugin.compression import compress, is_main_process
from lm_calib_plugin.engine.activations import quantizers
from lm_calib_plugin.engine.fingerprint import packed_layers
from lm_calib_plugin.engine.kv_cache import kv_bits
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.architecture import described
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.integrations.arguments import (
    PRUNING,
    QUANTIZATION,
    check_kind,
    check_plain,
    load_tokenizer,
    read_fields,
    tell,
)
from lm_calib_plugin.integrations.own_tokenizer import tokenizer_of_files
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime

# The others belong to an evaluation or an export.
_NO_USE = {"divergence", "export_dir", "export_format", "on_leak"}
_RUNTIME = frozenset(RUNTIME_ARGUMENTS) - _NO_USE
_KEY = "quant_method"


class _CalibOnLoadConfig(QuantizationConfigMixin):
    """A recipe as a quantization configuration of transformers.

    Parameters
    ----------
    tokenizer
        A tokenizer, or the name of one; default: that of the model. Only looked at when text is
        needed.
    fields
        Fields of :class:`~lm_calib_plugin.recipe.Recipe`, or ``recipe=`` a YAML file, a mapping or
        a :class:`~lm_calib_plugin.recipe.Recipe`; and those of
        :class:`~lm_calib_plugin.runtime.Runtime` that matter here, such as ``calib_batch_size``.

    Raises
    ------
    UserError
        For every value that can not be used, as soon as the configuration is made.
    """

    quant_method: Any = ""
    kinds: tuple[str, ...] = ()
    other = ""

    def __init__(self, *, tokenizer: Any = None, **fields: Any) -> None:
        named = fields.pop(_KEY, self.quant_method)
        if named != type(self).quant_method:
            raise UserError(
                _KEY, f"got {named!r}", f"{type(self).__name__} is {type(self).quant_method}"
            )
        self.quant_method = named
        self.recipe, self.runtime = read_fields(fields, _RUNTIME, ("tokenizer",))
        check_kind(self.recipe, self.kinds, self.other)
        check_calibration(self.recipe)
        self.tokenizer = tokenizer

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as the constructor and ``from_dict`` take them back.

        A tokenizer in memory is named by where it came from.
        """
        defaults = Runtime()
        chosen = {name: getattr(self.runtime, name) for name in sorted(_RUNTIME)}
        name = self.tokenizer
        if name is not None and not isinstance(name, str):
            name = getattr(name, "name_or_path", "") or None
        return {
            _KEY: self.quant_method,
            **self.recipe.to_metadata(),
            **{k: v for k, v in chosen.items() if v != getattr(defaults, k)},
            **({} if name is None else {"tokenizer": name}),
        }

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Make a configuration of plain values, which may come from a checkpoint.

        Raises
        ------
        UserError
            As the constructor does, and for a recipe that is the name of a file.
        """
        check_plain(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = self.to_dict(), other.to_dict()  # type: ignore[attr-defined]
        return bool(mine == theirs)

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # transformers copies its arguments; a tokenizer may be large.
        found = copy.copy(self)
        memo[id(self)] = found
        return found


class CalibPruneConfig(_CalibOnLoadConfig):
    """Prune on load: ``from_pretrained(M, quantization_config=CalibPruneConfig(...))``."""

    __doc__ += "\n" + str(_CalibOnLoadConfig.__doc__).partition("\n")[2]
    quant_method = "calib_prune"
    kinds = PRUNING
    other = "CalibQuantConfig"


class CalibQuantConfig(_CalibOnLoadConfig):
    """Quantize on load: ``from_pretrained(M, quantization_config=CalibQuantConfig(...))``."""

    __doc__ += "\n" + str(_CalibOnLoadConfig.__doc__).partition("\n")[2]
    quant_method = "calib_quant"
    kinds = QUANTIZATION
    other = "CalibPruneConfig"


class CalibOnLoad(HfQuantizer):
    """What transformers calls while it loads a model with one of these configurations."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # Why the model can not be saved as an ordinary one; empty: it can.
        self.held_by = ""
        self._tokenizer: Any = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse checkpoints that are compressed already, and weights on disk."""
        if self.pre_quantized:
            raise UserError(
                "quantization_config",
                f"config.json of the model names {self.quantization_config.quant_method}",
                "recipes come from your own program, never from a checkpoint",
                "take quantization_config out of config.json",
            )
        places = kwargs.get("device_map")
        if isinstance(places, dict) and "disk" in places.values():
            raise _offloaded("device_map puts some on disk")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Look for the tokenizer, which costs nothing yet."""
        config = self.quantization_config
        if not config.recipe.terms:
            self._tokenizer = config.tokenizer
        elif config.tokenizer is None:
            self._tokenizer = tokenizer_of_files(model, checkpoint_files)
        else:
            self._tokenizer = load_tokenizer(config.tokenizer)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Compress the loaded model and leave an ordinary one behind."""
        config = self.quantization_config
        self._take_off(model)
        _check_weights(model)
        # This object may stay with the model; the tokenizer has done its work then.
        tokenizer, self._tokenizer = self._tokenizer, None
        before = _shapes(model)
        with random_state_untouched():
            report = compress(model, tokenizer, config.recipe, config.runtime)
        model.calib_report = report
        rounded = _rounded_while_running(model)
        self.held_by = rounded or ("" if _shapes(model) == before else _not_built(model))
        if self.held_by:
            model.hf_quantizer = self
        if rounded:
            model.is_quantized = True  # no casts, and no training, which would have no gradient
        if is_main_process():
            tell(report)
        return model

    def _take_off(self, model: Any) -> None:
        """Undo what transformers noted about quantization: identity and saving look at it."""
        self.remove_quantization_config(model)
        model.__dict__.pop("is_quantized", None)
        for module in model.modules():
            getattr(getattr(module, "config", None), "__dict__", {}).pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        """Tell whether ``save_pretrained`` may go on.

        Raises
        ------
        UserError
            When it would lose what is rounded while the model runs, with what to use instead.
        """
        if self.held_by:
            verb = "CalibPruner.from_pretrained(M).prune"
            if self.quantization_config.quant_method == CalibQuantConfig.quant_method:
                verb = "CalibQuantizer.from_pretrained(M).quantize"
            raise UserError(
                "save_pretrained",
                f"{self.held_by}, which plain weights and configuration do not say",
                "models that are nothing but their weights are saved this way",
                f"for a folder that says it: {verb}(save_dir=OUT) or lm-calib export",
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Models that keep this object round while they run, which has no gradient."""
        return False


def _rounded_while_running(model: nn.Module) -> str:
    """Name what a live model does beside what its weights say, or return an empty text."""
    if packed_layers(model):
        return "layers run on packed kernels (execution=packed)"
    if quantizers(model):
        return "inputs of layers are rounded while the model runs"
    if kv_bits(model) is not None:
        return "keys and values are rounded while the model runs"
    return ""


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _not_built(model: Any) -> str:
    """Say why the configuration does not build the model, or return an empty text."""
    try:
        described(model, copy.deepcopy(model.config), {})
    except UserError as error:
        return str(error).removeprefix("export: ").partition("; ")[0].rstrip(".")
    return ""


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that are not all here.

    Raises
    ------
    UserError
        For weights that were left on disk or are split over processes.
    """
    for name, parameter in model.named_parameters():
        if parameter.device == torch.device("meta"):
            raise _offloaded(f"{name} was offloaded")
        if type(parameter.data).__name__ == "DTensor":
            raise UserError(
                "tp_plan",
                f"{name} is split over processes",
                "whole weights on one device or several",
                "load without tp_plan",
            )


def _offloaded(what: str) -> UserError:
    return UserError(
        "device_map",
        f"all weights have to be in memory to be compressed, and {what}",
        "cpu, a GPU, or several GPUs that hold the whole model",
        "for instance device_map=cpu",
    )


def _register() -> None:
    """Make transformers know both configurations; once, however often this module is loaded."""
    for kind in (CalibPruneConfig, CalibQuantConfig):
        AUTO_QUANTIZATION_CONFIG_MAPPING.pop(kind.quant_method, None)
        AUTO_QUANTIZER_MAPPING.pop(kind.quant_method, None)
        register_quantization_config(kind.quant_method)(kind)
        register_quantizer(kind.quant_method)(CalibOnLoad)


_register()
