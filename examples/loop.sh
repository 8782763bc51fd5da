#!/usr/bin/env bash
# The alternating run by hand: what `ple run` does, as two commands in a loop. Stop it anywhere and start it again:
# what is done is not done twice.
#
#   MODEL=sft QUERIES=queries.jsonl PRINCIPLES=hh REWARD_MODEL=reward RUN=runs/loop ROUNDS=3 examples/loop.sh
#
# QUERIES_PER_ROUND=N takes the next N queries each round, in an order drawn from the seed, as `ple run` does.
# GEN_OPTIONS and TRAIN_OPTIONS hold more options of the two commands. For two environments put full paths into
# GEN and TRAIN, e.g. GEN=.venv-vllm/bin/ple-gen.
set -euo pipefail

read -ra gen_options <<<"${GEN_OPTIONS:-}"
read -ra train_options <<<"${TRAIN_OPTIONS:-}"
adapter=()
for ((t = 0; t < ${ROUNDS:-5}; t++)); do
  slice=()
  if [[ -n "${QUERIES_PER_ROUND:-}" ]]; then # other queries in every round
    slice=(--shuffle --skip $((t * QUERIES_PER_ROUND)) --limit "$QUERIES_PER_ROUND")
  fi
  policy="$RUN/policy/round=$(printf %03d "$t")"
  "${GEN:-ple-gen}" --model "$MODEL" "${adapter[@]}" --queries "$QUERIES" --principles "$PRINCIPLES" \
    --reward-model "$REWARD_MODEL" --data "$RUN/data" --round "$t" "${slice[@]}" "${gen_options[@]}"
  "${TRAIN:-ple-train}" --model "$MODEL" "${adapter[@]}" --data "$RUN/data" --round "$t" --output "$policy" \
    "${train_options[@]}"
  adapter=(--adapter "$policy")
done
