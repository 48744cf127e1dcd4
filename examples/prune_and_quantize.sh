#!/usr/bin/env bash
# Prune 2:4 and quantize to 4 bits in one sweep, from a recipe file.
set -euo pipefail
cd "$(dirname "$0")"
lm_eval --model calib \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,recipe=${RECIPE:-joint.yaml}" \
    --tasks calib_demo_cloze --batch_size 16 --device cpu "$@"
