#!/usr/bin/env bash
# Estimators beside each other: a small model of bytes trained with weights and activations at few
# bits, a million tokens each.
#
#   runs/quest-small.sh TEXT...
#
# PRESET, LR, STEPS, SEEDS and CELLS may be set; a cell is NAME:BITS, `full:32` is without
# quantization. What is there already is not trained again. The last lines are the table: validation
# loss in nats per byte, the mean over seeds ± half of the range. With the defaults about an hour
# and a half on two cores.
set -euo pipefail
texts=""
for text in "$@"; do
    texts+="\"$(realpath "$text")\", "
done
cd "$(dirname "$0")/.."

anybit="${ANYBIT:-${CARGO_TARGET_DIR:-target}/release/anybit}"
preset="${PRESET:-1m}"
out=".cache/quest-small-$preset-bytes${LR:+-lr$LR}${STEPS:+-steps$STEPS}"
mkdir -p "$out"
cat >"$out/recipe.toml" <<TOML
out = "$out/run"
[model]
preset = "$preset"
[data]
train = [$texts]
context = 128
validation_share = 0.05
tokenizer = { vocab_size = 258 }
[train]
steps = ${STEPS:-1024}
batch = 8
lr = ${LR:-3e-3}
validate_every = 100000
checkpoint_every = 100000
keep = 1
TOML

# NAME to an estimator of both operands, as TOML.
estimator() {
    case "$1" in
        quest) echo "{ type = \"quest\", bits = $2 }" ;;
        quest-no-hadamard) echo "{ type = \"quest\", bits = $2, hadamard = 0 }" ;;
        # The same rotation and grid with gradient everywhere, or to 1 or 2 times the grid's end.
        quest-no-trust) echo "{ type = \"ste\", bits = $2, hadamard = 128 }" ;;
        quest-s1) echo "{ type = \"quest\", bits = $2, clip_scale = 1.0 }" ;;
        quest-s2) echo "{ type = \"quest\", bits = $2, clip_scale = 2.0 }" ;;
        lsq) echo "{ type = \"lsq\", bits = $2 }" ;;
        ste) echo "{ type = \"ste\", bits = $2 }" ;;
        pact) echo "{ type = \"pact\", bits = $2 }" ;;
        quarot-qat) echo "{ type = \"absmax\", bits = $2, hadamard = 128 }" ;;
    esac
}
default="full:32"
for bits in 2 1 4 8; do
    for name in quest lsq ste pact quarot-qat; do
        default+=" $name:$bits"
    done
done
for name in quest-no-hadamard quest-no-trust; do
    default+=" $name:2 $name:1"
done
default+=" quest-s1:1 quest-s2:1"
for seed in ${SEEDS:-0 1}; do
    for cell in ${CELLS:-$default}; do
        name="${cell%:*}" bits="${cell#*:}"
        folder="$out/$name-$bits-$seed"
        [ -f "$folder/report.json" ] && continue
        sets=(--set "seed=$seed")
        if [ "$name" != full ]; then
            both="$(estimator "$name" "$bits")"
            sets+=(--set "quantizer.weights=$both" --set "quantizer.activations=$both")
        fi
        "$anybit" --quiet train "$out/recipe.toml" --out "$folder" --force "${sets[@]}" \
            >"$out/$name-$bits-$seed.log" 2>&1 || echo "$name $bits $seed failed: $(tail -1 "$out/$name-$bits-$seed.log")"
        rm -rf "$folder/checkpoints" "$folder/data" "$folder/model"
    done
done
python3 - "$out" <<'PYTHON'
import collections, json, pathlib, sys

losses = collections.defaultdict(list)
for report in sorted(pathlib.Path(sys.argv[1]).glob("*-*-*/report.json")):
    name, bits, _ = report.parent.name.rsplit("-", 2)
    losses[name, int(bits)].append(json.loads(report.read_text())["validation_loss"])
bits = sorted({b for _, b in losses if b < 32})
cell = lambda v: f"{sum(v) / len(v):.4f} ± {(max(v) - min(v)) / 2:.4f}" if v else "-"
print("| estimator | " + " | ".join(f"W{b}A{b}" for b in bits) + " |")
print("|---" * (len(bits) + 1) + "|")
for name in dict.fromkeys(n for n, _ in losses if n != "full"):
    print(f"| {name} | " + " | ".join(cell(losses.get((name, b), [])) for b in bits) + " |")
print(f"| full precision | {cell(losses['full', 32])} |")
PYTHON
