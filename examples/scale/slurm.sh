#!/bin/bash
# One round on Slurm: 8 tasks of one GPU share the sampling, one scores on 8 GPUs, 8 processes train.
#   sbatch --array=0-7 --gres=gpu:1 examples/scale/slurm.sh gen 0
#   sbatch --gres=gpu:8 --dependency=... examples/scale/slurm.sh score 0
#   sbatch --gres=gpu:8 --dependency=... examples/scale/slurm.sh train 0
# A task that is killed is started again with the same line: what is committed is never made again.
#SBATCH --job-name=ple
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
stage=$1 round=$2
model=sft data=$SCRATCH/ple/data
adapter=()
if [ "$round" -gt 0 ]; then
  adapter=(--adapter "$(printf 'policy/round=%03d' $((round - 1)))")
fi

case $stage in
  gen)
    .venv-vllm/bin/ple-gen --model "$model" "${adapter[@]}" --queries queries.parquet --principles hh \
      --shuffle --skip $((round * 2048)) --limit 2048 --data "$data" --round "$round"
    ;;
  score)
    .venv/bin/ple-score --data "$data" --reward-model reward --round "$round" --workers 8
    ;;
  train)
    .venv/bin/torchrun --nproc-per-node 8 -m cli train --model "$model" "${adapter[@]}" --data "$data" \
      --round "$round" --objective ple-residual --without rank --output "$(printf 'policy/round=%03d' "$round")"
    ;;
esac
