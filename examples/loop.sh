#!/usr/bin/env bash
# The alternating run by hand: what `ple run` does, as two commands in a loop. Stop it anywhere and start it again:
# what is done is not done twice.
#
#   MODEL=sft QUERIES=queries.jsonl PRINCIPLES=hh REWARD_MODEL=reward RUN=runs/loop ROUNDS=3 examples/loop.sh
#
# GEN_OPTIONS and TRAIN_OPTIONS hold more options of the two commands. For two environments put full paths into
# GEN and TRAIN, e.g. GEN=.venv-vllm/bin/ple-gen.
set -euo pipefail

read -ra gen_options <<<"${GEN_OPTIONS:-}"
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
adapter=()
for ((t = 0; t < ${ROUNDS:-5}; t++)); do
  policy="$RUN/policy/round=$(printf %03d "$t")"
  "${GEN:-ple-gen}" --model "$MODEL" "${adapter[@]}" --queries "$QUERIES" --principles "$PRINCIPLES" \
    --reward-model "$REWARD_MODEL" --data "$RUN/data" --round "$t" "${gen_options[@]}"
  "${TRAIN:-ple-train}" --model "$MODEL" "${adapter[@]}" --data "$RUN/data" --round "$t" --output "$policy" \
    "${train_options[@]}"
  adapter=(--adapter "$policy")
done
