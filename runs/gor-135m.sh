#!/usr/bin/env bash
# SKIM's models of SmolLM2-135M at 2.25 and 3 bits, their codebooks trained on the text alone, with
# the teacher at a fixed weight, and with GoR; all against the demo's reference model.
#
#   runs/gor-135m.sh TEST.raw TEXT...
#
# As runs/skim-wikitext2.sh: TEST.raw is measured on, TEXTs are calibrated and trained on. BITS, LR,
# STEPS and TOKENS may be set. The teacher is run once over the texts; what is finished is not run
# again, and what was interrupted goes on. Models of other settings: OUT.
set -euo pipefail
test_text="$(realpath "$1")"
shift
calibration=()
texts=""
for text in "$@"; do
    calibration+=(--calib "$(realpath "$text")")
    texts+="\"$(realpath "$text")\", "
done
cd "$(dirname "$0")/.."

anybit="${ANYBIT:-${CARGO_TARGET_DIR:-target}/release/anybit}"
reference=.cache/demo/reference
cache=.cache/gor-135m
out="${OUT:-$cache}"
mkdir -p "$cache" "$out"
models=()

quantize() {
    local bits="$1"
    [ -d "$cache/skim-$bits" ] || "$anybit" quantize "$reference" "${calibration[@]}" \
        --method skim --bits "$bits" --report-tokens 0 --out "$cache/skim-$bits"
    models+=("$cache/skim-$bits")
}

distill() {
    local name="$1" bits="$2" balancer="$3"
    local run="$out/$name-$bits"
    [ -f "$run/report.json" ] || "$anybit" distill runs/gor-135m.toml --out "$run" --resume \
        --set "model.init='$cache/skim-$bits'" --set "data.train=[$texts]" \
        --set "train.lr=${LR:-2e-3}" --set "train.steps=${STEPS:-120}" \
        --set "distill.balancer=$balancer"
    models+=("$run/model")
}

for bits in ${BITS:-2.25 3}; do
    quantize "$bits"
    # The teacher's loss counts for nothing: the text alone.
    distill text "$bits" '{ type = "fixed", task = 1.0, teacher = 0.0 }'
    distill fixed "$bits" '{ type = "fixed" }'
    distill gor "$bits" '{ type = "gor" }'
done
"$anybit" eval "${models[@]}" --reference "$reference" --text "$test_text" \
    --limit-tokens "${TOKENS:-32768}" --json "$out/scores.json"
