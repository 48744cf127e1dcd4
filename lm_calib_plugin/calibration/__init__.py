"""Calibration data: source, packing, and the calibration set they make.

>>> from lm_calib_plugin.calibration import build_calibration  # doctest: +SKIP
>>> drawn = build_calibration(recipe, tokenizer, model, seqlen=512,
...                           model_id="...", vocab_size=49152)  # doctest: +SKIP
>>> drawn.save("my-set", tokenizer=tokenizer)  # doctest: +SKIP
"""

from lm_calib_plugin.calibration.build import (
    build_calibration,
    make_source,
    model_needed,
    needs_model,
    stored_sets,
    validate_calibration,
)
from lm_calib_plugin.calibration.calibration_set import CalibrationSet
from lm_calib_plugin.calibration.options import Option
from lm_calib_plugin.calibration.packers import Packed, Packer
from lm_calib_plugin.calibration.sources.base import Context, Document, IdSource, Source
from lm_calib_plugin.calibration.tokens import tokenizer_digest

__all__ = [
    "CalibrationSet",
    "Context",
    "Document",
    "IdSource",
    "Option",
    "Packed",
    "Packer",
    "Source",
    "build_calibration",
    "make_source",
    "model_needed",
    "needs_model",
    "stored_sets",
    "tokenizer_digest",
    "validate_calibration",
]
