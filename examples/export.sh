#!/usr/bin/env bash
# Keep a compressed model as an ordinary folder, look at it, and evaluate it without this package.
# usage: [MODEL=...] [OUT=...] examples/export.sh [more arguments of lm_eval]
set -euo pipefail

MODEL=${MODEL:-builtin:smollm2-135m}
OUT=${OUT:-my-model}

lm-calib export --pretrained "$MODEL" --method wanda --sparsity 0.5 \
    --calibration random --nsamples 16 --seqlen 64 "$OUT"
lm-calib inspect "$OUT"
lm-calib pack "$OUT" "$OUT.packed"
lm_eval --model hf --model_args "pretrained=$OUT" --tasks calib_demo_grammar "$@"
