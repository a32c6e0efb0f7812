#!/usr/bin/env bash
# Every method at about the same bits per weight, on the demo's reference model.
#
#   runs/skim-wikitext2.sh TEST.raw CALIBRATION...
#
# As runs/gptq-wikitext2.sh. Gradients are taken twice (labels of the text for SqueezeLLM and SKIM,
# of the model for anybit) and kept in .cache/skim-wikitext2/.anybit-cache. WHOLE_BITS, CODE_BITS and
# TOTAL_BITS may be set; each needs some minutes per method.
set -euo pipefail
test_text="$(realpath "$1")"
shift
calibration=()
for text in "$@"; do
    calibration+=(--calib "$(realpath "$text")")
done
cd "$(dirname "$0")/.."

anybit="${CARGO_TARGET_DIR:-target}/release/anybit"
reference=.cache/demo/reference
out=.cache/skim-wikitext2
mkdir -p "$out"
models=()
quantize() {
    local name="$1"
    shift
    [ -d "$out/$name" ] || "$anybit" quantize "$reference" "${calibration[@]}" --report-tokens 0 \
        --out "$out/$name" "$@"
    models+=("$out/$name")
}
# Whole bits, a grid per row: what the methods cost in codes alone, and what a group adds.
for bits in ${WHOLE_BITS:-3}; do
    quantize "rtn-$bits" --method rtn --bits "$bits" --group-size -1
    quantize "gptq-$bits" --method gptq --bits "$bits" --group-size -1
    quantize "rtn-$bits-g64" --method rtn --bits "$bits" --group-size 64
    quantize "gptq-$bits-g64" --method gptq --bits "$bits" --group-size 64
    quantize "awq-$bits-g64" --method awq --bits "$bits" --group-size 64 --asym
    quantize "squeezellm-$bits" --method squeezellm --bits "$bits"
done
for bits in ${CODE_BITS:-2.25 3 3.2 4}; do
    quantize "skim-$bits" --method skim --bits "$bits"
done
for bits in ${TOTAL_BITS:-2.25 3 3.2 4}; do
    quantize "skim-$bits-total" --method skim --bits "$bits" --count total
    quantize "anybit-$bits-total" --method anybit --bits "$bits" --count total
done
"$anybit" eval "${models[@]}" --reference "$reference" --text "$test_text" \
    --limit-tokens "${TOKENS:-32768}" --json "$out/scores.json"
