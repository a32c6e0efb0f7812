#!/usr/bin/env bash
# Same bytes, whose KL divergence: anybit against llama.cpp's types with an importance matrix, both
# calibrated on the same texts, scored by the same program on the same tokens.
#
#   LLAMA_CPP=DIR runs/llamacpp-sizes.sh TEST.raw CALIBRATION...
#
# DIR holds llama-quantize and llama-imatrix (llama.cpp, MIT; the source distribution of
# llama-cpp-python on PyPI builds them). TYPES, SIZES and TOKENS may be set. A type's file is turned
# back into f32 by llama-quantize and read from there; `--match` takes the bytes of its tensors. SIZES
# are those of models by anybit alone. About two hours on two cores.
set -euo pipefail
tools="$(realpath "${LLAMA_CPP:?the folder of llama-quantize and llama-imatrix}")"
test_text="$(realpath "$1")"
shift
calibration=()
texts=()
for text in "$@"; do
    texts+=("$(realpath "$text")")
    calibration+=(--calib "$(realpath "$text")")
done
cd "$(dirname "$0")/.."

anybit="${CARGO_TARGET_DIR:-target}/release/anybit"
reference=.cache/demo/reference
out=.cache/llamacpp-sizes
mkdir -p "$out"
[ -f "$out/f32.gguf" ] || "$anybit" convert "$reference" "$out/f32.gguf" --dtype f32 --force
if [ ! -f "$out/imatrix.gguf" ]; then
    cat "${texts[@]}" >"$out/calibration.txt"
    "$tools/llama-imatrix" -m "$out/f32.gguf" -f "$out/calibration.txt" -o "$out/imatrix.gguf" \
        -c 512 --chunks 128 -t "$(nproc)" >"$out/imatrix.log" 2>&1
fi
models=()
for type in ${TYPES:-IQ2_XS IQ2_M Q2_K IQ3_S Q3_K_M IQ4_XS Q4_K_M}; do
    [ -f "$out/$type.gguf" ] || "$tools/llama-quantize" --imatrix "$out/imatrix.gguf" \
        "$out/f32.gguf" "$out/$type.gguf" "$type" "$(nproc)" >"$out/$type.log" 2>&1
    [ -f "$out/$type-f32.gguf" ] || "$tools/llama-quantize" --allow-requantize "$out/$type.gguf" \
        "$out/$type-f32.gguf" F32 "$(nproc)" >>"$out/$type.log" 2>&1
    [ -d "$out/anybit-$type" ] || "$anybit" quantize "$reference" --method anybit \
        --match "$out/$type.gguf" "${calibration[@]}" --report-tokens 0 --out "$out/anybit-$type"
    models+=("$out/$type-f32.gguf" "$out/anybit-$type")
done
for size in ${SIZES:-40MB 50MB 60MB 70MB 80MB}; do
    [ -d "$out/anybit-$size" ] || "$anybit" quantize "$reference" --method anybit \
        --max-bytes "$size" "${calibration[@]}" --report-tokens 0 --out "$out/anybit-$size"
    models+=("$out/anybit-$size")
done
"$anybit" eval "${models[@]}" --reference "$reference" --text "$test_text" \
    --limit-tokens "${TOKENS:-32768}" --json "$out/scores.json"
ls -l "$out"/*.gguf
