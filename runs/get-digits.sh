#!/usr/bin/env bash
# The 1,797 handwritten digits of 8×8 pixels that scikit-learn ships, as four IDX files in
# .cache/digits: every third one to test. Small enough for tests of a few seconds. The wheel is
# unpacked, not installed; python3 is needed for this script only.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.cache/digits
[ -f "$out/t10k-labels-idx1-ubyte" ] && exit 0
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps \
    --only-binary :all: --dest "$work" scikit-learn
"${PYTHON:-python3}" - "$out" "$work"/*.whl <<'PYTHON'
import gzip, pathlib, struct, sys, zipfile

out, wheel = pathlib.Path(sys.argv[1]), zipfile.ZipFile(sys.argv[2])
text = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
rows = [[int(float(v)) for v in line.split(",")] for line in text.split()]
assert len(rows) == 1797 and all(len(row) == 65 for row in rows)
test = rows[::3]
train = [row for i, row in enumerate(rows) if i % 3]
for part, rows in (("train", train), ("t10k", test)):
    pixels = bytes(min(255, 16 * v) for row in rows for v in row[:64])
    labels = bytes(row[64] for row in rows)
    head = struct.pack(">4B3I", 0, 0, 8, 3, len(rows), 8, 8)
    (out / f"{part}-images-idx3-ubyte").write_bytes(head + pixels)
    head = struct.pack(">4BI", 0, 0, 8, 1, len(rows))
    (out / f"{part}-labels-idx1-ubyte").write_bytes(head + labels)
PYTHON
ls -l "$out"
