#!/usr/bin/env bash
# 8-bit weights and inputs, ranges of the inputs calibrated on a text file of your own.
set -euo pipefail
cd "$(dirname "$0")"
lm_eval --model calib_quantized \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,method=smoothquant,scheme=W8A8_static,observer=mse,calibration=file:my.jsonl,pack=pad,nsamples=8,seqlen=64" \
    --tasks calib_demo_cloze --batch_size 16 --device cpu "$@"
