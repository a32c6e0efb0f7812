#!/usr/bin/env bash
# Accuracy of a small 2-bit network on Fashion-MNIST (1,000 images, a fifth of the labels redrawn) by
# balancer, scale of the teacher's loss and seed, into docs/results/gor-fashion.json.
#
#   runs/gor-fashion.sh [--set KEY=VALUE]...
#
# What is finished is not run again. JSON may name another file for the figures: with
# JSON=docs/results/gor-fashion-w1a1.json, `--set quantizer.weights.bits=1 --set
# quantizer.activations.bits=1 --out .cache/gor-fashion-w1a1` is the same at one bit.
set -euo pipefail
cd "$(dirname "$0")/.."
runs/get-fashion-mnist.sh >/dev/null
mkdir -p docs/results
anybit="${ANYBIT:-${CARGO_TARGET_DIR:-target}/release/anybit}"
"$anybit" distill-vision runs/gor-fashion.toml --sweep \
    --json "${JSON:-docs/results/gor-fashion.json}" "$@"
