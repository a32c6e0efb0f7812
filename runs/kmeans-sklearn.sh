#!/usr/bin/env bash
# Exact weighted k-means of rows against scikit-learn's KMeans (k-means++, one start, at most 50
# iterations, as SqueezeLLM calls it), the same rows in the same run, one thread each: time and cost
# at 2, 3 and 4 bits. Rows are those of real weights when a matrix is given as a .npy file of
# [rows, cols], else Gaussian ones of 576; weights are lognormal.
#
#   runs/kmeans-sklearn.sh [MATRIX.npy]
#
# Needs numpy and scikit-learn (installed in .cache/venv-sklearn); neither is part of the program.
set -euo pipefail
matrix="${1:+$(realpath "$1")}"
cd "$(dirname "$0")/.."
venv=.cache/venv-sklearn
if ! "$venv/bin/python" -c 'import sklearn' 2>/dev/null; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check scikit-learn
fi
cargo build --release --locked --package anybit-core --example kmeans_rows
ours="${CARGO_TARGET_DIR:-target}/release/examples/kmeans_rows"
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$venv/bin/python" - "$ours" "$matrix" <<'PYTHON'
import json, subprocess, sys, time
import numpy as np
from sklearn.cluster import KMeans

ours, matrix = sys.argv[1], sys.argv[2]
rng = np.random.default_rng(0)
values = np.load(matrix)[:200] if matrix else rng.standard_normal((200, 576))
values = np.ascontiguousarray(values, "<f4")
weights = np.exp(1.5 * rng.standard_normal(values.shape)).astype("<f4")
rows, cols = values.shape
print(f"{rows} rows of {cols}")
for bits in (2, 3, 4):
    command = [ours, str(rows), str(cols), str(bits)]
    data = values.tobytes() + weights.tobytes()
    done = json.loads(subprocess.run(command, input=data, capture_output=True, check=True).stdout)
    started, costs = time.perf_counter(), []
    for x, w in zip(values.astype("f8"), weights.astype("f8")):
        model = KMeans(2**bits, n_init=1, random_state=0, max_iter=50)
        costs.append(model.fit(x[:, None], sample_weight=w).inertia_)
    seconds = time.perf_counter() - started
    ratios = np.array(costs) / np.array(done["costs"])
    print(f"{bits} bits: {done['seconds']:.3f} s against {seconds:.3f} s, "
          f"{seconds / done['seconds']:.1f} times as fast; scikit-learn's cost is "
          f"{ratios.mean():.4f} of ours on average, {ratios.min():.6f} at least")
    assert ratios.min() > 1 - 1e-9, "a cost above scikit-learn's"
PYTHON
