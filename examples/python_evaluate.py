"""Evaluate a model compressed on load from Python.

usage: python examples/python_evaluate.py [MODEL]
"""

from __future__ import annotations

import sys

import lm_eval

import lm_calib_plugin  # noqa: F401 - makes `calib_pruned` known to the harness

results = lm_eval.simple_evaluate(
    model="calib_pruned",
    model_args={
        "pretrained": sys.argv[1] if len(sys.argv) > 1 else "builtin:smollm2-135m",
        "dtype": "float32",
        "method": "magnitude",
        "sparsity": 0.3,
    },
    tasks=["calib_demo_grammar"],
    batch_size=16,
    device="cpu",
    limit=40,
    bootstrap_iters=0,
)
print(results["results"])
print(results["config"]["compression"]["achieved"])
