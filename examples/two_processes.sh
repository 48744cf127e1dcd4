#!/usr/bin/env bash
# Two processes compress together (each runs its part of the calibration set) and then share the evaluation.
# Without a GPU: ACCELERATE_USE_CPU=1 ACCELERATE_ARGS=--multi_gpu
set -euo pipefail
accelerate launch --num_processes "${PROCESSES:-2}" ${ACCELERATE_ARGS:-} -m lm_eval \
    --model calib_pruned \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,method=magnitude,sparsity=0.5" \
    --tasks calib_demo_cloze --limit 20 "$@"
