#!/usr/bin/env bash
# Every kernel alone, at each level of instructions that the machine has: median time and rates, as a
# table in docs/results/kernels.md and as numbers in docs/results/kernels.json.
#
#   runs/kernels.sh [BENCH...]
#
# BENCH names files of crates/anybit-kernels/benches; without any, all run. Rows of benches that do
# not run stay in the file if the same processor with as many threads made them. MAX_TIME is the
# number of seconds for each case (0.5), RAYON_NUM_THREADS that of threads. Attention, transforms and
# elementwise functions are compiled for the floor of .cargo/config.toml and run once. All take some
# ten minutes on two cores; nothing else may run meanwhile.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p docs/results
cargo bench --locked -p anybit-kernels --no-run
"${PYTHON:-python3}" - "${MAX_TIME:-0.5}" "$@" <<'PYTHON'
import json, os, pathlib, re, subprocess, sys

max_time, *chosen = sys.argv[1:]
FOLLOWS = {"gemv": True, "linear": True, "integer": True, "norm": True, "attention": False,
           "transform": False, "elementwise": False}
LEVELS = ["scalar", "avx2", "avx512"]
SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60}
SCALES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
OUT = pathlib.Path("docs/results/kernels.json")


def bench(name, level, *options):
    command = ["cargo", "bench", "--quiet", "--locked", "-p", "anybit-kernels", "--bench", name,
               "--", *options]
    env = dict(os.environ)
    if level:
        env["ANYBIT_ISA"] = level
    else:
        env.pop("ANYBIT_ISA", None)
    return subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")


def rate(cell):
    """Units per second: "12.3 GB/s", "4.5 Mitem/s"; none for what is no rate."""
    found = re.fullmatch(r"([\d.]+) ([KMGT]?)(B|item)/s", cell)
    return (found[3], float(found[1]) * SCALES[found[2]]) if found else None


def parse(text):
    """Rows of divan's tree. A branch is three characters deep; a line with a branch and no times
    opens a function, one with times is a case, and lines without a branch are its rates. Columns
    are fastest, slowest, median, mean, samples, iterations."""
    rows, path = [], []
    for line in text.splitlines():
        branch = re.match(r"([│ ]*)[├╰]─ (.+?) {2,}(\S.*)$", line)
        if branch:
            path = [*path[:len(branch[1]) // 3], branch[2]]
            cells = [cell.strip() for cell in branch[3].split("│")]
            if cells[0]:
                value, unit = cells[2].split()
                rows.append({"function": path[0], "case": path[1] if len(path) > 1 else "",
                             "median_s": float(value) * SECONDS[unit], "samples": int(cells[4])})
        elif rows:
            cells = [cell.strip() for cell in re.sub(r"^[│ ]+", "", line).split("│")]
            found = rate(cells[2]) if len(cells) > 2 else None
            if found:
                rows[-1]["bytes_per_s" if found[0] == "B" else "items_per_s"] = found[1]
    return rows


unknown = set(chosen) - set(FOLLOWS)
if unknown:
    sys.exit(f"no such bench: {', '.join(sorted(unknown))}; there are {', '.join(FOLLOWS)}")
# A program that lacks the level says so and fails before it lists its benches.
levels = [level for level in LEVELS if bench("norm", level, "--list").returncode == 0]
if not levels:
    sys.exit("no bench runs: see cargo bench -p anybit-kernels --bench norm -- --list")
rows, threads = [], set()
for name in chosen or FOLLOWS:
    for level in levels if FOLLOWS[name] else [""]:
        print(f"{name} {level}".strip(), file=sys.stderr, flush=True)
        done = bench(name, level, "--color", "never", "--sort", "location", "--max-time", max_time)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\n{done.stderr}\n{name} failed")
        threads.add(int(re.search(r"^\w+, (\d+) threads$", done.stderr, re.MULTILINE)[1]))
        found = parse(done.stdout)
        assert found and all("items_per_s" in row or "bytes_per_s" in row for row in found), \
            f"not divan's output:\n{done.stdout}"
        rows += [{"bench": name, "isa": level, **row} for row in found]

memory = {row["isa"]: row["bytes_per_s"] for row in rows if row["function"] == "memory"}
for row in rows:
    if row["function"] == "beyond_caches":
        row["memory_share"] = row["bytes_per_s"] / memory[row["isa"]]
model = re.search(r"^model name\s*: (.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
machine = {"processor": model[1] if model else "unknown", "threads": threads.pop()}
assert not threads, "other numbers of threads"
kept = []
if OUT.exists():
    before = json.loads(OUT.read_text())
    if before["machine"] == machine:
        again = {row["bench"] for row in rows}
        kept = [row for row in before["rows"] if row["bench"] not in again]
order = list(FOLLOWS)
everything = sorted(kept + rows, key=lambda row: order.index(row["bench"]))


def write(path, text):
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


write(OUT, json.dumps({"machine": machine, "rows": everything}, indent=1))
lines = [f"{machine['processor']}, {machine['threads']} threads; medians of `runs/kernels.sh`", "",
         "| kernel | case | level | µs | GB/s | of memory | 10⁹ items/s |", "|---|---|---|---|---|---|---|"]
for row in everything:
    share = f"{row['memory_share']:.0%}" if "memory_share" in row else ""
    rates = [f"{row[key] / 1e9:.2f}" if key in row else "" for key in ("bytes_per_s", "items_per_s")]
    cells = [f"{row['bench']} {row['function']}", row["case"], row["isa"],
             f"{1e6 * row['median_s']:.1f}", rates[0], share, rates[1]]
    lines.append("| " + " | ".join(cells) + " |")
write(OUT.with_suffix(".md"), "\n".join(lines))
print("\n".join(lines))
PYTHON
