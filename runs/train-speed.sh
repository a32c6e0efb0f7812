#!/usr/bin/env bash
# How fast training is: whole optimizer steps of anybit against PyTorch on the CPU, in full precision
# and with QuEST at four bits, the same shapes, batches, optimizer and threads on random tokens.
#
#   runs/train-speed.sh
#
# The two programs take turns, ROUNDS times (3); tokens per second are medians over rounds of the
# medians over STEPS (10) steps, and "range" is that of the rounds' ratios. First losses must be
# about ln(vocabulary) for both. SHAPES ("3M 30M"), QUANTIZERS ("none quest") and THREADS (2) may be
# set; TORCH_FLAGS are more flags for runs/torch_train.py, such as --compile. Needs PyTorch
# (installed in .cache/venv-torch; set TORCH_PYTHON to use another), which is no part of the program.
# About 20 minutes on two cores that do nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

anybit="${CARGO_TARGET_DIR:-target}/release/anybit"
python="${TORCH_PYTHON:-.cache/venv-torch/bin/python}"
if ! "$python" -c 'import torch' 2>/dev/null; then
    if [ -n "${TORCH_PYTHON:-}" ]; then
        echo "$TORCH_PYTHON cannot import torch" >&2
        exit 1
    fi
    "${PYTHON:-python3}" -m venv .cache/venv-torch
    "$python" -m pip install --quiet --disable-pip-version-check torch numpy
fi
out=.cache/train-speed
rm -rf "$out"
mkdir -p "$out"

threads="${THREADS:-2}"
shape_of() {
    case "$1" in
        3M) echo --layers 4 --hidden 256 --heads 4 --ffn 768 --vocab 4096 --context 256 --batch 8 ;;
        30M) echo --layers 6 --hidden 640 --heads 5 --ffn 1792 --vocab 32000 --context 512 --batch 2 ;;
        *) echo "SHAPES: $1 is neither 3M nor 30M" >&2 && return 1 ;;
    esac
}
for shape in ${SHAPES:-3M 30M}; do
    shape_flags="$(shape_of "$shape")"
    for quantizer in ${QUANTIZERS:-none quest}; do
        read -ra flags <<<"$shape_flags --steps ${STEPS:-10} --quantizer $quantizer --bits 4"
        for round in $(seq "${ROUNDS:-3}"); do
            name="$out/$shape-$quantizer-$round"
            "$anybit" --threads "$threads" bench-train "${flags[@]}" --json "$name-anybit.json"
            # shellcheck disable=SC2086
            "$python" runs/torch_train.py "${flags[@]}" --threads "$threads" ${TORCH_FLAGS:-} \
                --json "$name-torch.json" >/dev/null
        done
    done
done

"$python" - "$out" <<'PYTHON'
import json, statistics, sys
from pathlib import Path

runs = {}
for path in sorted(Path(sys.argv[1]).glob("*.json"), key=lambda p: p.stat().st_mtime):
    shape, quantizer, _, program = path.stem.split("-")
    case = runs.setdefault((shape, quantizer), {"anybit": [], "torch": []})
    case[program].append(json.loads(path.read_text()))
last = next(reversed(runs.values()))["torch"][-1]
print(f"torch {last['torch']}, fused AdamW: {last['fused_adamw']}, compiled: {last['compiled']}, "
      f"{last['threads']} threads; tokens per second")
row = "{:6} {:9} {:>10} {:>10} {:>13} {:>12}  {}"
print(row.format("shape", "quantizer", "anybit", "torch", "anybit/torch", "range", "first losses"))
for (shape, quantizer), case in runs.items():
    for key in ("parameters", "threads"):
        assert len({run[key] for done in case.values() for run in done}) == 1, f"other {key}"
    speeds = {program: [run["tokens_per_s"] for run in done] for program, done in case.items()}
    ours, theirs = (statistics.median(speeds[program]) for program in ("anybit", "torch"))
    ratios = [a / b for a, b in zip(speeds["anybit"], speeds["torch"])]
    losses = " ".join(f"{done[0]['first_loss']:.3f}" for done in case.values())
    print(row.format(shape, quantizer, f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}",
                     f"{min(ratios):.2f}-{max(ratios):.2f}", losses))
PYTHON
