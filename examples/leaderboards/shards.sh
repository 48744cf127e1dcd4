#!/usr/bin/env bash
# Parts of a grid in folders of their own, as machines without a common disk have them, then the
# records of all brought together by copying. Here one after another; on machines of their own each
# runs one `--shard`, and what is copied (scp, rsync, a bucket) is nothing but records/*.json.
set -euo pipefail
grid="${GRID:?a grid file, see the others in this folder}"
shards="${SHARDS:-2}"
out="${OUT:-leaderboards/merged}"

for shard in $(seq "$shards"); do
    # A shard with failed cells ends with 1: the others go on, and the report names the failures.
    lm-calib leaderboard run "$grid" --shard "$shard/$shards" --out "$out-$shard" "$@" || true
done

mkdir -p "$out/records"
for shard in $(seq "$shards"); do
    cp "$out-$shard"/records/*.json "$out/records/"
done
lm-calib leaderboard report "$grid" --out "$out"
