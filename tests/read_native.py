#!/usr/bin/env python3
"""Reads the packed checkpoint DIR as docs/format.md describes it, with numpy and nothing of anybit:
decodes every packed matrix and compares its bytes and squared norm with the manifest's. Prints OK,
or exits with 1 at the first difference. Usage: python tests/read_native.py DIR"""
import json, pathlib, struct, sys
import numpy as np

TYPES = {"U32": "<u4", "U16": "<u2", "F16": "<f2", "F32": "<f4"}  # of packed parts

def read_parts(folder):
    parts = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, np.uint8, "r")
        start = 8 + struct.unpack("<Q", data[:8].tobytes())[0]
        for name, info in json.loads(data[8:start].tobytes()).items():
            if info.get("dtype") in TYPES:
                begin, end = (start + offset for offset in info["data_offsets"])
                parts[name] = data[begin:end].view(TYPES[info["dtype"]]).reshape(info["shape"])
    return parts

def unpack(words, bits, count):
    """Bit streams [rows, words] to codes [rows, count]."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    assert not stream[:, count * bits :].any(), "padding bits are set"
    codes = stream[:, : count * bits].reshape(len(words), count, bits)
    return codes @ (1 << np.arange(bits)).astype(np.uint8)

def decode_plane(cols, grid, part):
    bits, codes = grid["bits"], unpack(part("codes"), grid["bits"], cols)
    if grid["type"] == "codebook":
        return np.take_along_axis(part("codebook").astype("f4"), codes.astype(int), axis=1)
    group = np.arange(cols) // (grid["group_size"] or cols)
    if grid["type"] == "shared_codebook":
        return part("table").astype("f4")[codes] * part("scales").astype("f4")[:, group]
    if grid["type"] == "half_integer":
        zero = np.array((2**bits - 1) / 2, "f4")
    elif grid["symmetric"]:
        zero = np.array(2 ** (bits - 1), "f4")
    else:
        zero = unpack(part("zeros"), bits, group[-1] + 1)[:, group].astype("f4")
    return (codes - zero) * part("scales").astype("f4")[:, group]

def decode(linear, record, parts):
    n, planes = record["column_groups"], []
    for i, plane in enumerate(record["planes"]):
        part = lambda kind: parts[f"{linear}.{kind}.{i // n}.{i % n}"]
        planes.append(decode_plane(plane["cols"], plane["grid"], part))
    matrix = np.vstack([np.hstack(planes[i : i + n]) for i in range(0, len(planes), n)])
    matrix = matrix[parts[linear + ".row_perm"]] if record["row_perm"] else matrix
    if record.get("row_groups"):
        bits = max(1, (len(record["planes"]) // n - 1).bit_length())
        groups = unpack(parts[linear + ".row_groups"][None], bits, record["rows"])[0]
        perm = np.empty(len(groups), int)
        perm[np.argsort(groups, kind="stable")] = np.arange(len(groups))
        matrix = matrix[perm]
    if record["column_scale"]:
        matrix = matrix * parts[linear + ".column_scale"].astype("f4")
    if record.get("sparse") is not None:
        rows = np.repeat(np.arange(record["rows"]), np.diff(parts[linear + ".sparse_rows"]))
        values = parts[linear + ".sparse_values"].astype("f4")
        matrix[rows, parts[linear + ".sparse_cols"]] += values
    return matrix

folder = pathlib.Path(sys.argv[1])
manifest, parts = json.loads((folder / "anybit.json").read_text()), read_parts(folder)
assert manifest["format_version"] in (1, 2), f"format version {manifest['format_version']}"
for name, record in manifest["quantized"].items():
    linear = name.removesuffix(".weight")
    matrix, own = decode(linear, record, parts), {n for n in parts if n.startswith(linear + ".")}
    assert matrix.shape == (record["rows"], record["cols"]), f"{name}: shape {matrix.shape}"
    assert sum(parts[n].nbytes for n in own - {linear + ".bias"}) == record["bytes"], name
    assert np.isclose(np.sum(matrix.astype("f8") ** 2), record["decoded_norm"], 1e-6, 0), name
print(f"OK: {len(manifest['quantized'])} packed matrices of {folder.name}")
