#!/usr/bin/env bash
# Data-parallel evaluation: every process compresses its own copy, and all copies must be identical.
# Without a GPU: ACCELERATE_USE_CPU=1 ACCELERATE_ARGS=--multi_gpu
set -euo pipefail
accelerate launch --num_processes "${PROCESSES:-2}" ${ACCELERATE_ARGS:-} -m lm_eval \
    --model calib_pruned \
    --model_args "pretrained=${MODEL:-builtin:smollm2-135m},dtype=float32,method=magnitude,sparsity=0.5" \
    --tasks calib_demo_cloze --limit 20 "$@"
