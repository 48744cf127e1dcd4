#!/usr/bin/env bash
# The same command where start-up files do not run (python -S, zip applications, --target installs).
set -euo pipefail
python -m lm_calib_plugin eval --model calib_pruned \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,method=magnitude,sparsity=0.5" \
    --tasks calib_demo_cloze --limit 20 --device cpu "$@"
