"""``CalibPruner`` and ``CalibQuantizer``: compress and export, by the habits of Optimum."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import check_calibration
from lm_calib_plugin.compression import compress, is_main_process
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.card import base_license
from lm_calib_plugin.export.folder import ExportResult, asked_of, check_out, export_model
from lm_calib_plugin.export.formats import check_export, check_model
from lm_calib_plugin.export.options import ExportOptions, Provenance
from lm_calib_plugin.integrations.arguments import (
    PRUNING,
    QUANTIZATION,
    check_kind,
    load_tokenizer,
    read_fields,
    tell,
)
from lm_calib_plugin.integrations.calib_config import CalibConfig
from lm_calib_plugin.integrations.own_tokenizer import tokenizer_of
from lm_calib_plugin.loading import Loading, load_weights
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.recipe_file import FILE_ARGUMENT
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime

_NO_USE = {"divergence", "export_dir", "export_format", "on_leak"}
_RUNTIME = frozenset(RUNTIME_ARGUMENTS) - _NO_USE
_OPTIONS = ("export_format", "max_shard_size", "overwrite", "keep_calibration", "check")


class _Compressor(OptimumQuantizer):  # type: ignore[misc]
    """What both classes share. Made by :meth:`from_pretrained`.

    ``report`` and ``exported`` are those of the last run, None before; ``config`` its
    :class:`~lm_calib_plugin.integrations.calib_config.CalibConfig`.
    """

    kinds: tuple[str, ...] = ()
    other = ""

    def __init__(self, model: Any, tokenizer: Any, loading: Loading | None) -> None:
        self._model, self._tokenizer, self._loading = model, tokenizer, loading
        self._compressed = False
        self.report: Report | None = None
        self.exported: ExportResult | None = None
        self.config: CalibConfig | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        revision: str = "main",
        dtype: Any = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
        subfolder: str = "",
    ) -> Any:
        """Say which model is compressed; it is loaded when it is first needed.

        Parameters
        ----------
        model
            A model in memory, which is compressed in place, or a hub name, a folder, or
            ``builtin:NAME``.
        tokenizer
            A tokenizer, or the name of one; default: that of the model.
        revision, dtype, trust_remote_code, subfolder
            As for ``AutoModelForCausalLM.from_pretrained``, where the model is not in memory.
        device
            Where it goes; default: ``cuda`` where there is one.

        Raises
        ------
        UserError
            For a dtype that there is not, and a device that this machine does not have.
        """
        if not isinstance(model, (str, Path)):
            return cls(model, tokenizer, None)
        dtype = str("auto" if dtype is None else dtype).removeprefix("torch.")
        device = None if device is None else str(device)
        named = tokenizer if isinstance(tokenizer, str) else None
        loading = Loading(str(model), named, revision, dtype, device, trust_remote_code, subfolder)
        return cls(None, tokenizer, loading)

    @property
    def model(self) -> Any:
        """The model: compressed once that has been done, else as it was given."""
        if self._model is None:
            assert self._loading is not None
            self._model = load_weights(self._loading)
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first asked for; None where there is none to find."""
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            if self._loading is not None:
                name, options = self._loading.of_tokenizer()
                self._tokenizer = load_tokenizer(name, **options)
            elif self._tokenizer is not None:
                self._tokenizer = load_tokenizer(self._tokenizer)
            elif getattr(self.model, "name_or_path", None):
                self._tokenizer = tokenizer_of(self.model)
        return self._tokenizer

    def _run(
        self,
        save_dir: str | Path | None,
        calibration: Any,
        config: CalibConfig | None,
        given: dict[str, Any],
    ) -> Report:
        out = None if save_dir is None else Path(save_dir).expanduser()
        options = _export_options(given, config, out)
        ready = calibration if isinstance(calibration, CalibrationSet) else None
        if ready is None and calibration is not None:
            given = {**given, "calibration": calibration}
        recipe, runtime = _recipe(given, config)
        check_kind(recipe, self.kinds, self.other)
        if ready is None:
            check_calibration(recipe)
        if out is not None:
            check_export(recipe, options.format)
            asked = asked_of(self._provenance().pretrained, options)
            check_out(out, recipe, options.overwrite, name="save_dir", asked=asked)
        if self._compressed:
            self._start_again()
        tokenizer = self.tokenizer if out is not None or (recipe.terms and ready is None) else None
        model = self.model
        if out is not None:
            check_model(model, recipe, options.format)
        self._compressed = True
        try:
            report = compress(model, tokenizer, recipe, runtime, calibration=ready)
        except UserError:
            self._compressed = False  # refused before any weight was changed
            raise
        self.report, self.exported = report, None
        self.config = CalibConfig.from_recipe(recipe, options.format)
        if is_main_process():
            tell(report)
            if out is not None:
                self.exported = export_model(
                    model, tokenizer, recipe, report, out, options, self._provenance()
                )
                sys.stderr.write(f"lm-calib: {self.exported.line()}\n")
        return report

    def _start_again(self) -> None:
        """Take the dense model again, where it came from a name."""
        if self._loading is None:
            raise UserError(
                "model",
                "has been compressed already",
                "a model that is as it came",
                f"load it again, and {type(self).__name__}.from_pretrained(MODEL)",
            )
        self._model, self._compressed = None, False

    def _provenance(self) -> Provenance:
        if self._loading is None:
            return Provenance(str(getattr(self.model, "name_or_path", "")) or "a model in memory")
        found = self._loading
        revision = None if found.revision == "main" else found.revision
        return Provenance(
            found.pretrained,
            revision,
            base_license(resolve_pretrained(found.pretrained)),
            trust_remote_code=found.trust_remote_code,
        )


class CalibPruner(_Compressor):
    """Prune a causal language model, and keep it as an ordinary Hugging Face folder."""

    kinds = PRUNING
    other = "CalibQuantizer.from_pretrained(MODEL).quantize"

    def prune(
        self,
        save_dir: str | Path | None = None,
        calibration: Any = None,
        config: CalibConfig | None = None,
        **recipe: Any,
    ) -> Report:
        """Prune the model, and write it to a new folder if one is named.

        Parameters
        ----------
        save_dir
            The folder to make.
        calibration
            An expression, its list form, or a
            :class:`~lm_calib_plugin.calibration.CalibrationSet` made before; used instead of the
            sources that ``config`` names.
        config
            A recipe and a format; other fields given beside it have to agree with it.
        recipe
            Fields of :class:`~lm_calib_plugin.recipe.Recipe` and of
            :class:`~lm_calib_plugin.runtime.Runtime`, and beside ``save_dir`` those of
            :class:`~lm_calib_plugin.export.options.ExportOptions` (``format`` is called
            ``export_format``).

        Returns
        -------
        Report
            What was done; ``model`` is the pruned model then.

        Raises
        ------
        UserError
            For what can not be used; before anything is loaded wherever that can be known.
        """
        return self._run(save_dir, calibration, config, recipe)

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: quantizing is what the other class does."""
        raise UserError("quantize", "CalibPruner prunes", "its verb is prune", f"use {self.other}")


class CalibQuantizer(_Compressor):
    """Quantize a causal language model, and keep it as an ordinary Hugging Face folder."""

    kinds = QUANTIZATION
    other = "CalibPruner.from_pretrained(MODEL).prune"

    def quantize(
        self,
        save_dir: str | Path | None = None,
        calibration: Any = None,
        config: CalibConfig | None = None,
        **recipe: Any,
    ) -> Report:
        """Quantize the model, and write it to a new folder if one is named.

        Arguments, result and errors are those of :meth:`CalibPruner.prune`.
        """
        return self._run(save_dir, calibration, config, recipe)

    def prune(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: pruning is what the other class does."""
        raise UserError(
            "prune", "CalibQuantizer quantizes", "its verb is quantize", f"use {self.other}"
        )


def _recipe(given: dict[str, Any], config: CalibConfig | None) -> tuple[Recipe, Runtime]:
    """Return recipe and runtime of a call; what stands in two places has to agree."""
    fields = {name: value for name, value in given.items() if value is not None}
    if config is not None:
        if not isinstance(config, CalibConfig):
            raise UserError("config", f"got a {type(config).__name__}", "a CalibConfig")
        if FILE_ARGUMENT in fields:
            raise UserError(FILE_ARGUMENT, "given beside config", fix="choose one")
        fields[FILE_ARGUMENT] = config.to_dict()[FILE_ARGUMENT]
        if "calibration" in fields:
            del fields[FILE_ARGUMENT]["calibration"]
    return read_fields(fields, _RUNTIME, _OPTIONS)


def _export_options(
    given: dict[str, Any], config: CalibConfig | None, out: Path | None
) -> ExportOptions:
    """Take the export options out of what was given, and check them."""
    chosen = {name: given.pop(name) for name in _OPTIONS if name in given}
    if out is None and chosen:
        name = next(iter(chosen))
        raise UserError(name, "given without save_dir", "it is about the folder", "give save_dir=")
    asked = chosen.pop("export_format", None)
    if isinstance(config, CalibConfig):
        if asked not in (None, config.export_format):
            raise UserError(
                "export_format",
                f"got {asked!r} as an argument and {config.export_format!r} in config",
                fix="choose one",
            )
        asked = config.export_format
    try:
        return ExportOptions(**({} if asked is None else {"format": asked}), **chosen)
    except UserError as error:
        raise (error.renamed("export_format") if error.argument == "format" else error) from None
