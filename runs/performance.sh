#!/usr/bin/env bash
# Tokens per second of anybit and of llama.cpp on the same machine, the same shapes and about the
# same bits, in turns; medians. Prints a table and writes docs/results/performance.json.
#
#   LLAMA_CPP=DIR runs/performance.sh [PRESET]
#
# DIR holds llama-bench and llama-quantize (llama.cpp, MIT; the source distribution of
# llama-cpp-python on PyPI builds them). PRESET is 135m (the demo's model) or 1.1b (random weights of a
# real shape); REPEAT is the number of rounds (5). Nothing else may run meanwhile.
set -euo pipefail
tools="$(realpath "${LLAMA_CPP:?the folder of llama-bench and llama-quantize}")"
export LD_LIBRARY_PATH="$tools${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
cd "$(dirname "$0")/.."
preset="${1:-135m}"
anybit="$(realpath "${CARGO_TARGET_DIR:-target}/release/anybit")"
work=".cache/performance/$preset"
mkdir -p "$work" docs/results

if [ "$preset" = 135m ]; then
    ln -sfn "$PWD/.cache/demo/reference" "$work/dense"
    head=()
else
    # Its head is not the embedding.
    head=(--head-bits BITS)
    [ -d "$work/dense" ] || "$anybit" --quiet synth --preset "$preset" --out "$work/dense"
fi
[ -f "$work/f16.gguf" ] ||
    "$anybit" --quiet convert "$(realpath "$work/dense")" "$work/f16.gguf" --dtype f16 --force
# Types of llama.cpp and bits of anybit that stand for each other, in groups of 32.
pairs=(F16:dense Q8_0:8 Q4_0:4 Q4_K_M:4 Q3_K_M:3 Q2_K:2)
for pair in "${pairs[@]}"; do
    type="${pair%%:*}" bits="${pair##*:}"
    [ "$type" = F16 ] && ln -sf f16.gguf "$work/F16.gguf"
    [ -e "$work/$type.gguf" ] || "$tools/llama-quantize" "$work/f16.gguf" "$work/$type.gguf" \
        "$type" "$(nproc)" >/dev/null 2>&1
    [ -d "$work/$bits" ] || "$anybit" --quiet quantize "$(realpath "$work/dense")" --method rtn --bits "$bits" \
        --group-size 32 --embed-bits "$bits" "${head[@]/BITS/$bits}" --report-tokens 0 --out "$work/$bits" >/dev/null
done
python3 - "$tools/llama-bench" "$anybit" "$work" "$preset" "${REPEAT:-5}" "${pairs[@]}" <<'PYTHON'
import json, os, pathlib, statistics, subprocess, sys

bench, anybit, work, preset, repeat, *pairs = sys.argv[1:]
threads = str(os.cpu_count())


def run(command):
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


rows = {}
for _ in range(int(repeat)):
    for pair in pairs:
        kind, bits = pair.split(":")
        row = rows.setdefault(pair, {"llama.cpp": [], "anybit": [], "batch 8": [], "share": []})
        pp, tg = run([bench, "-m", f"{work}/{kind}.gguf", "-t", threads, "-r", "1", "-o", "json"])
        row["llama.cpp"].append((pp["avg_ts"], tg["avg_ts"]))
        ours = run([anybit, "--quiet", "bench", f"{work}/{bits}", "--repeat", "1", "--batch", "1,8",
                    "--json", "-"])
        row["anybit"].append((ours["prefill_tokens_per_s"], ours["decode_tokens_per_s"]))
        row["batch 8"].append(ours["batches"][1]["decode_tokens_per_s"])
        row["share"].append(ours["stream_share"])
        machine = {key: ours[key] for key in ("isa", "threads", "machine")}
table = []
for pair, row in rows.items():
    kind, bits = pair.split(":")
    middle = lambda engine, at: statistics.median(sample[at] for sample in row[engine])
    table.append({
        "llama_cpp": kind,
        "anybit": bits,
        "llama_cpp_bytes": os.stat(f"{work}/{kind}.gguf").st_size,
        "anybit_bytes": sum(f.stat().st_size
                            for f in pathlib.Path(work, bits).glob("*.safetensors")),
        "prefill": [middle("llama.cpp", 0), middle("anybit", 0)],
        "decode": [middle("llama.cpp", 1), middle("anybit", 1)],
        "decode_batch_8": statistics.median(row["batch 8"]),
        "stream_share": statistics.median(row["share"]),
    })
out = pathlib.Path("docs/results/performance.json")
results = json.loads(out.read_text()) if out.exists() else {}
results[f"{preset} {machine['isa']}"] = {"machine": machine, "rounds": int(repeat), "rows": table}
out.write_text(json.dumps(results, indent=2) + "\n")
print("| llama.cpp | anybit | prefill 512 | | | decode 128 | | | of memory | 8 sequences |")
print("|---|---|---|---|---|---|---|---|---|---|")
for row in table:
    name = lambda kind, size: f"{kind}, {size / 1e6:.0f} MB"
    cells = [name(row["llama_cpp"], row["llama_cpp_bytes"]),
             name(row["anybit"] + " bits" * (row["anybit"] != "dense"), row["anybit_bytes"])]
    for theirs, ours in (row["prefill"], row["decode"]):
        cells += [f"{theirs:.1f}", f"{ours:.1f}", f"**{ours / theirs:.2f}**"]
    cells += [f"{row['stream_share']:.0%}", f"{row['decode_batch_8']:.1f}"]
    print("| " + " | ".join(cells) + " |")
PYTHON
