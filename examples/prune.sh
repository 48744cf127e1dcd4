#!/usr/bin/env bash
# Prune half of the weights on load and evaluate, in one stock lm_eval command.
set -euo pipefail
lm_eval --model calib_pruned \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,method=wanda,sparsity=0.5,calibration=self,nsamples=16,seqlen=256" \
    --tasks calib_demo_cloze --batch_size 16 --device cpu "$@"
