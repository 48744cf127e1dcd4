"""``CalibModelForCausalLM``: an exported folder, found to be what was evaluated."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from lm_calib_plugin.builtin_models import PREFIX
from lm_calib_plugin.errors import CalibError, UserError
from lm_calib_plugin.export.options import FILES
from lm_calib_plugin.export.records import Summary, read_summary, verify_folder
from lm_calib_plugin.guard import random_state_untouched
from lm_calib_plugin.integrations.arguments import first_line
from lm_calib_plugin.integrations.calib_config import CalibConfig
from lm_calib_plugin.integrations.same_weights import compare_with_record

log = logging.getLogger(__name__)

# What concerns the download, and not the loading of the folder that it ends in.
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


class CalibModelForCausalLM:
    """Opens exported folders; what comes out is an ordinary model of transformers."""

    def __init__(self) -> None:
        raise UserError(
            "CalibModelForCausalLM", "can not be made by itself", fix="use .from_pretrained(FOLDER)"
        )

    @classmethod
    def from_pretrained(cls, model: str | Path, **kwargs: Any) -> Any:
        """Check every file of an exported folder, load it with plain transformers, check it again.

        Parameters
        ----------
        model
            A folder that was exported, or the hub name of one.
        kwargs
            As for ``AutoModelForCausalLM.from_pretrained``.

        Returns
        -------
        transformers.PreTrainedModel
            The model as ``AutoModelForCausalLM`` makes it, with ``calib_config`` (a
            :class:`~lm_calib_plugin.integrations.calib_config.CalibConfig`) and ``calib_report``
            (a dict) added.

        Raises
        ------
        UserError
            When there is no such folder, or it was not exported.
        CalibError
            When a file is not as it was written, or the loaded weights are not those that the
            record describes.
        """
        folder = _folder(model, kwargs)
        if folder.is_dir() and not (folder / FILES).exists():
            raise UserError(
                "model",
                f"`{model}` is no exported folder: it holds no {FILES}",
                "what lm-calib export, CalibPruner and CalibQuantizer write",
                f"for any other model: AutoModelForCausalLM.from_pretrained({str(model)!r})",
            )
        verify_folder(folder)
        summary = read_summary(folder)
        if summary.config is None or summary.report is None:
            raise CalibError(f"{folder}: holds no configuration or no report; export it again.")
        config = CalibConfig.from_dict(summary.config)
        found = _load(folder, kwargs)
        checked = compare_with_record(
            found, config.recipe, summary.record.facts, summary.report, _stored_dtype(folder)
        )
        found.calib_config, found.calib_report = config, summary.report
        told = f"{_described(summary)}; {checked}"
        log.info("%s: %s", folder, told)
        sys.stderr.write(f"lm-calib: loaded {model}: {told}\n")
        return found


def _folder(model: str | Path, kwargs: dict[str, Any]) -> Path:
    """Return the folder of a model, downloaded if need be; hub arguments are taken out."""
    hub = {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    inside = kwargs.pop("subfolder", None) or ""
    place = Path(model).expanduser()
    if place.is_dir() or not isinstance(model, str) or model.startswith((PREFIX, "/", ".", "~")):
        return place / inside
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, **hub)) / inside
    except (OSError, ValueError) as error:
        raise UserError(
            "model",
            f"no folder `{model}`, and none could be had from the hub ({first_line(error)})",
            "a folder that was exported, or the hub name of one",
            "lm-calib export makes one",
        ) from None


def _load(folder: Path, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    with random_state_untouched():
        try:
            return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (OSError, ValueError, ImportError) as error:
            # The files are as they were written: it is the loading that does not suit them.
            raise CalibError(f"{folder}: transformers can not load it ({error}).") from error


def _described(summary: Summary) -> str:
    """Return method, strength, calibration, base and format in a line."""
    report, facts = summary.report or {}, summary.record.facts
    achieved, recipe = report.get("achieved") or {}, report.get("recipe") or {}
    parts = []
    if achieved.get("bits") is not None:
        parts.append(f"{achieved['bits']:.3g} bits")
    if achieved.get("bits") is None or recipe.get("sparsity") is not None:
        # Zeros among the levels of a quantized model were not removed.
        parts.append(f"{achieved.get('sparsity', 0):.2%} removed")
    data = (report.get("calibration") or {}).get("calib_id")
    return ", ".join(
        [
            str(recipe.get("method")),
            *parts,
            f"calibrated on {data[:12]}" if data else "no calibration data",
            f"base {facts.get('base_model')}",
            f"format {facts.get('format')}",
            f"key {str(facts.get('key'))[:12]}",
        ]
    )


def _stored_dtype(folder: Path) -> str | None:
    """Return the dtype that ``config.json`` names."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = content.get("dtype", content.get("torch_dtype"))
    return None if found is None else str(found)
