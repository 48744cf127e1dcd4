"""Prune a model in Python by Optimum's habits, keep it as a folder, and open it again.

usage: python examples/python_export.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibConfig, CalibModelForCausalLM, CalibPruner

name = sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m"
out = Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()) / "pruned"

config = CalibConfig(method="wanda", sparsity=0.5, nsamples=8, seqlen=64)
pruner = CalibPruner.from_pretrained(name)
report = pruner.prune(out, calibration="random", config=config)
print(report.line())

# Every file and every weight is checked, and what was loaded is told in a line.
model = CalibModelForCausalLM.from_pretrained(out)
print(type(model).__name__, model.calib_config.recipe.method, model.calib_report["achieved"])

# An ordinary folder: this needs no package but transformers.
plain = AutoModelForCausalLM.from_pretrained(out)
zeros = sum(int((w == 0).sum()) for name, w in plain.named_parameters() if "proj" in name)
print(f"{zeros} zeros, loaded by transformers alone")
