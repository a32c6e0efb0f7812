#!/usr/bin/env bash
# The table of the README: RTN and GPTQ at 4 and 3 bits on the demo's reference model.
#
#   runs/gptq-wikitext2.sh TEST.raw CALIBRATION...
#
# TEST.raw is the raw WikiText-2 test split without blank lines (CC BY-SA 3.0); CALIBRATION are the
# texts to calibrate GPTQ on, never the one that is measured on. About 20 minutes on two cores.
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
out=.cache/gptq-wikitext2
mkdir -p "$out"
for bits in 4 3; do
    "$anybit" quantize "$reference" --method rtn --bits "$bits" --out "$out/rtn-$bits" --force
    "$anybit" quantize "$reference" --method gptq --bits "$bits" "${calibration[@]}" \
        --out "$out/gptq-$bits" --force
done
"$anybit" eval "$reference" "$out"/{rtn-4,gptq-4,rtn-3,gptq-3} --reference "$reference" \
    --text "$test_text" --limit-tokens 32768 --json "$out/scores.json"
