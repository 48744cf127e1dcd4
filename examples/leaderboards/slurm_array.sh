#!/usr/bin/env bash
# One part of a grid for each task of a SLURM array, all in one folder on a common disk:
#
#     GRID=grid.yaml sbatch --array=1-8 --gres=gpu:1 examples/leaderboards/slurm_array.sh
#
# A task that is cut off loses the cell it was in; submit the same line again, and only what has no
# record is run. With several GPUs a task (--gres=gpu:4), add --jobs auto. Then, on any machine:
# `lm-calib leaderboard report grid.yaml`.
#SBATCH --job-name=leaderboard
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=leaderboard-%A-%a.log
set -euo pipefail
part="${SLURM_ARRAY_TASK_ID:?submit with sbatch --array=1-N}/$SLURM_ARRAY_TASK_COUNT"
# Through srun the warning before the time limit (SIGTERM) reaches the command, which then ends in
# order. `--quiet`: a progress bar is no use in a log.
exec srun lm-calib leaderboard run "${GRID:?a grid file}" --shard "$part" --quiet "$@"
