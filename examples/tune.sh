#!/bin/sh
# Finds the fastest way to score a file on this computer, and scores it that way.
#
#     sh examples/tune.sh MODEL texts.jsonl OUT
#
# 1. machine: measures this computer, once, in about a minute   OUT/machine.yaml
# 2. plan:    says what fits, how fast and what binds           (printed)
# 3. tune:    measures around that plan on slices of the job    OUT/tuned.yaml
# 4. score:   does the job with the fastest policy              OUT/scores.jsonl
#
# Killed and run again it goes on where it was.
set -eu
if [ $# -ne 3 ]; then
    echo "usage: sh $0 MODEL ROWS OUT" >&2
    exit 2
fi
model=$1 rows=$2 out=$3
mkdir -p "$out"

[ -e "$out/machine.yaml" ] || penstock machine --disk "$model" -o "$out/machine.yaml"
penstock plan "$model" --machine "$out/machine.yaml"
[ -e "$out/tuned.yaml" ] ||
    penstock tune "$model" "$rows" --machine "$out/machine.yaml" -o "$out/tuned.yaml"
penstock score "$model" "$rows" -o "$out/scores.jsonl" \
    --policy "$out/tuned.yaml" --report "$out/report"
