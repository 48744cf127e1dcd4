"""Compress a model while transformers loads it, for any script that takes a model.

usage: python examples/transformers_on_load.py [MODEL]
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from lm_calib_plugin import CalibPruneConfig, CalibQuantConfig, builtin_model

path = sys.argv[1] if len(sys.argv) > 1 else str(builtin_model("smollm2-135m"))
data = {"calibration": "random", "nsamples": 8, "seqlen": 64}
for config in (
    CalibPruneConfig(method="wanda", sparsity=0.5, **data),
    CalibQuantConfig(method="gptq", bits=4, group_size=16, **data),
):
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    print(model.calib_report.line())
    # An ordinary model from here on: pipelines, trainers and save_pretrained work as ever.
    write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(path))
    print(write("The capital of France", max_new_tokens=8, do_sample=False)[0]["generated_text"])
