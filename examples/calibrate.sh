#!/usr/bin/env bash
# Build a calibration set once, look at it, use it. The folder can be published and used by others.
set -euo pipefail
MODEL="${MODEL:-builtin:smollm2-135m}"
SET="${SET:-my-set}"
lm-calib calibrate "file:$(dirname "$0")/my.jsonl" --pretrained "$MODEL" --out "$SET" \
    --nsamples 8 --seqlen 64 --pack pad
head -n 8 "$SET/preview.txt"
lm_eval --model calib_pruned \
    --model_args "pretrained=$MODEL,dtype=float32,method=wanda,sparsity=0.5,calibration=set:$SET,on_leak=error" \
    --tasks calib_demo_cloze --batch_size 16 --device cpu "$@"
