"""Compress a model in Python, without the harness, and save it.

usage: python examples/python_compress.py [MODEL] [OUT]
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import Recipe, builtin_model, compress

path = sys.argv[1] if len(sys.argv) > 1 else builtin_model("smollm2-135m")
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(path)
recipe = Recipe(method="sparsegpt", sparsity=0.5, calibration="random", nsamples=8, seqlen=64)
report = compress(model, tokenizer, recipe)
print(report.line())
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])
