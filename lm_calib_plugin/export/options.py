"""What can be chosen about an exported folder, and what its maker knows beside the report."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.runtime import EXPORT_FORMATS

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class ExportOptions:
    """How a folder is written.

    Parameters
    ----------
    format
        ``dense``: ordinary numbers, zeros and levels included; ``compressed-tensors``: packed
        levels; ``gptq``: packed integer levels as gptqmodel reads them; ``auto``:
        ``compressed-tensors`` where weights or inputs are on levels, else dense. Nothing falls
        back: what a format can not hold is refused.
    max_shard_size
        Largest size of a weights file, such as ``5GB``.
    overwrite
        Replace a folder that was exported before (and holds nothing else).
    keep_calibration
        Put the calibration set itself into the folder, under ``calibration/``.
    check
        Load the written folder with plain transformers, and compare weights and logits with the
        model in memory, before it gets its name. Needs memory for a second model.
    """

    format: str = "auto"
    max_shard_size: str = MAX_SHARD_SIZE
    overwrite: bool = False
    keep_calibration: bool = False
    check: bool = True

    def __post_init__(self) -> None:
        if self.format not in EXPORT_FORMATS:
            raise UserError(
                "format",
                f"got {self.format!r}",
                nearest(self.format, EXPORT_FORMATS),
                f"allowed: {listed(EXPORT_FORMATS)}",
            )
        size = self.max_shard_size
        if not (isinstance(size, int) or re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", str(size), re.I)):
            raise UserError("max_shard_size", f"got {size!r}", "a number and a unit, such as 5GB")


@dataclass(frozen=True)
class Provenance:
    """Where a compressed model comes from, beside what its report says.

    Parameters
    ----------
    pretrained, revision
        The base model as it was named; a hub name, a folder, or ``builtin:NAME``.
    license
        Of the base model, as its card says; None: not known.
    command
        The exact command that made the folder; None where Python did.
    results
        A results file of lm_eval, or its ``results`` (task -> metric -> value), for the card.
    dense_results
        The same of the base model, to stand beside.
    trust_remote_code
        Whether code that came with the base model was allowed to run.
    adapters
        Names of what was merged into the base model before (adapters, weight differences).
    model_args
        Arguments of ``lm_eval --model hf`` beside ``pretrained`` that the model was evaluated
        with and scores depend on, such as ``attn_implementation``, ``add_bos_token``.
    """

    pretrained: str
    revision: str | None = None
    license: str | None = None
    command: str | None = None
    results: dict[str, Any] | None = None
    dense_results: dict[str, Any] | None = None
    trust_remote_code: bool = False
    adapters: tuple[str, ...] = ()
    model_args: dict[str, Any] = field(default_factory=dict)


# Files that stand beside weights, configuration and tokenizer; the names are fixed here and never
# read from a file.
CALIB_CONFIG = "calib_config.json"  # recipe and formats, as CalibConfig reads them
RECIPE = "recipe.yaml"  # for recipe=OUT/recipe.yaml
REPORT = "report.json"  # summary and rows of the report
CALIBRATION = "calibration.json"  # record of the calibration set, without its tokens
CALIBRATION_SET = "calibration"  # folder of the set itself, if asked for
CARD = "README.md"
FILES = "calib_files.json"  # size and sha256 of every other file
