#!/usr/bin/env bash
# Fashion-MNIST as four unpacked IDX files in .cache/fashion-mnist, from Debian's package
# dataset-fashion-mnist (MIT licence; 31 MB). Nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
out=.cache/fashion-mnist
[ -f "$out/t10k-labels-idx1-ubyte" ] && exit 0
mkdir -p "$out.partial"
out_path="$(realpath "$out.partial")"
(cd "$out_path" && apt-get download dataset-fashion-mnist)
echo "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0  $(ls "$out_path"/*.deb)" |
    sha256sum --check --quiet
dpkg-deb --extract "$out_path"/*.deb "$out_path/package"
for packed in "$out_path"/package/usr/share/datasets/fashion-mnist/*-ubyte.gz; do
    gunzip --stdout "$packed" >"$out_path/$(basename "$packed" .gz)"
done
rm -rf "$out_path/package" "$out_path"/*.deb
rm -rf "$out"
mv "$out_path" "$out"
ls -l "$out"
