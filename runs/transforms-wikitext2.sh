#!/usr/bin/env bash
# Weights, activations and cache at few bits behind every transform, on the demo's reference model.
#
#   runs/transforms-wikitext2.sh TEST.raw CALIBRATION...
#
# As runs/gptq-wikitext2.sh. PRESETS may name others than 4 ("BITS": weights, activations and cache
# at BITS bits; "w4a8kv8"; "kvBITS": only the cache). METHODS are the roundings of weights. Transforms
# are fitted once and kept in .cache/transforms-wikitext2/.anybit-cache. With the defaults about
# an hour and a half on two cores.
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
out=.cache/transforms-wikitext2
mkdir -p "$out"
bits_of() {
    case "$1" in
        kv*) echo --bits 16 --a-bits 16 --kv-bits "${1#kv}" ;;
        w*) echo --preset "$1" ;;
        *) echo --bits "$1" --a-bits "$1" --kv-bits "$1" ;;
    esac
}
models=()
for preset in ${PRESETS:-4}; do
    for transform in ${TRANSFORMS:-none scale quarot spinquant resq flatquant flatquant-fast}; do
        for method in ${METHODS:-rtn gptq}; do
            name="$out/$preset-$transform-$method"
            flags=(--transform "${transform%-fast}" --method "$method")
            if [ "$transform" = flatquant-fast ]; then
                flags+=(--fast)
            fi
            # shellcheck disable=SC2046
            [ -d "$name" ] || "$anybit" quantize "$reference" "${calibration[@]}" "${flags[@]}" \
                $(bits_of "$preset") --group-size -1 --calib-tokens "${CALIB_TOKENS:-32768}" \
                --report-tokens 0 --out "$name"
            models+=("$name")
        done
    done
done
"$anybit" eval "${models[@]}" --reference "$reference" --text "$test_text" \
    --limit-tokens "${TOKENS:-32768}" --json "$out/scores.json"
