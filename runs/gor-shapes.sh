#!/usr/bin/env bash
# mAP@0.5 of a 2-bit detector of shapes by balancer and seed (SEEDS, by default 0), a JSON file for
# each in docs/results/gor-shapes.
#
#   runs/gor-shapes.sh [--set KEY=VALUE]...
#
# Teacher and student in full precision are trained once per seed; the set is made once.
set -euo pipefail
cd "$(dirname "$0")/.."
anybit="${ANYBIT:-${CARGO_TARGET_DIR:-target}/release/anybit}"
results="${RESULTS:-docs/results/gor-shapes}"
mkdir -p "$results"
[ -d .cache/shapes ] || "$anybit" synth shapes --out .cache/shapes --train 2000 --test 500 --seed 0

run() {
    local name="$1" balancer="$2" seed="$3"
    shift 3
    echo "$name, seed $seed"
    "$anybit" distill-detector runs/gor-shapes.toml --force --set "seed=$seed" \
        --set "distill.balancer=$balancer" --json "$results/$name-$seed.json" "$@"
}

for seed in ${SEEDS:-0}; do
    run labels '{ type = "fixed", teacher = 0.0 }' "$seed" "$@"
    run fixed '{ type = "fixed" }' "$seed" "$@"
    run gor '{ type = "gor", first = "equilibrium" }' "$seed" "$@"
    run uncertainty '{ type = "uncertainty", first = "equilibrium" }' "$seed" "$@"
    run logit-gradient '{ type = "logit_gradient" }' "$seed" "$@"
done
