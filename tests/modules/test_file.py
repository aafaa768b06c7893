"""The file: equal bytes for equal modules, equal modules from equal bytes, and refusal of everything else."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intarsia.errors import ModuleError, StoreError
from intarsia.modules import DTYPES, Card, Module, dumps, file, load, loads, read_header, save
from tests.modules.make import base, container, forge, forked, module, one_of_each, tensors

ROOT = Path(__file__).parents[2]
SMALL = {"0.ffn/x.a": torch.tensor([1.5, -2.0, 3.25]), "0.ffn/x.b": torch.tensor([1, 0, 1], dtype=torch.uint8)}
FILE = dumps(module())


def same(a: Module, b: Module) -> None:
    assert a.digest == b.digest
    assert (a.name, a.method, a.base, a.labels, a.roles, a.requires, a.card, a.context) == (
        b.name, b.method, b.base, b.labels, b.roles, b.requires, b.card, b.context)  # fmt: skip
    assert list(a.tensors) == list(b.tensors)
    for key, tensor in a.tensors.items():
        other = b.tensors[key]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
        assert tensor.view(-1).view(torch.uint8).tolist() == other.view(-1).view(torch.uint8).tolist()


names = st.text("abcXYZ019_.-+:", min_size=1, max_size=6).filter(lambda s: s[0] not in ".-+:")
keys = st.builds(lambda a, b: f"{a}/{b}", names, names)
shapes = st.lists(st.integers(0, 3), max_size=4)
fills = st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 2**32))


def fill(spec: tuple[torch.dtype, list[int], int]) -> torch.Tensor:
    dtype, shape, seed = spec
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)


@given(st.dictionaries(keys, fills, max_size=5), st.none() | st.lists(st.text(st.characters(codec="utf-8"), max_size=5), unique=True).map(tuple),
       st.dictionaries(st.text("ab", min_size=1), st.text(st.characters(codec="utf-8"), max_size=4), max_size=2))  # fmt: skip
@settings(deadline=None)
def test_round_trip_is_bit_equal(specs: Any, labels: Any, roles: Any) -> None:
    made = module(tensors={key: fill(spec) for key, spec in specs.items()}, labels=labels, roles=roles)
    data = dumps(made)
    back = loads(data)
    same(made, back)
    assert dumps(back) == data


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    made = module(tensors=one_of_each())
    path = tmp_path / "m.safetensors"
    assert save(made, path) == made.digest
    assert path.read_bytes() == dumps(made)
    same(made, load(path))
    assert load(path, name="other").name == "other"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors"]


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(module(), path)
    back = load(path)
    path.write_bytes(b"x" * path.stat().st_size)
    path.unlink()
    same(back, module())


OTHER = """
import random, sys
from intarsia.modules import load, save
loaded = load(sys.argv[1])  # before anything else is imported
from tests.modules.make import module, one_of_each
items = list(one_of_each().items())
random.shuffle(items)
save(module(tensors=dict(items)), sys.argv[2])
save(loaded, sys.argv[3])
print(hash("x"), loaded.digest, ascii(loaded.labels))
"""


def test_another_process_loads_the_same_module_and_writes_the_same_bytes(tmp_path: Path) -> None:
    made = module(tensors=one_of_each())
    paths = [tmp_path / name for name in ("a", "made-there", "saved-again")]
    save(made, paths[0])
    env = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    done = subprocess.run([sys.executable, "-c", OTHER, *map(str, paths)], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    seed, digest, labels = done.stdout.split(" ", 2)
    assert int(seed) != hash("x") and digest == made.digest and labels == ascii(made.labels) + "\n"
    assert paths[0].read_bytes() == paths[1].read_bytes() == paths[2].read_bytes() == dumps(made)


def test_bytes_do_not_depend_on_insertion_order() -> None:
    items = list(one_of_each().items())
    for seed in range(5):
        random.Random(seed).shuffle(items)
        assert dumps(module(tensors=dict(items))) == dumps(module(tensors=one_of_each()))


def test_the_safetensors_library_reads_our_files(tmp_path: Path) -> None:
    made = module(tensors=one_of_each())
    save(made, tmp_path / "m.safetensors")
    with safetensors.safe_open(str(tmp_path / "m.safetensors"), "pt") as other:
        assert set(other.keys()) == set(made.tensors)
        assert all(torch.equal(other.get_tensor(k), t) for k, t in made.tensors.items())
        assert other.metadata()["digest"] == made.digest and other.metadata()["format"] == "intarsia-module"


def test_tensors_are_aligned(tmp_path: Path) -> None:
    save(module(tensors=one_of_each()), tmp_path / "m.safetensors")
    for entry in read_header(tmp_path / "m.safetensors").tensors.values():
        assert entry.begin % DTYPES[entry.dtype].itemsize == 0
    assert int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_header_is_read_without_tensors(tmp_path: Path) -> None:
    made, path = module(), tmp_path / "m.safetensors"
    save(made, path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1  # in the tensors: the header does not care
    path.write_bytes(damaged)
    header = read_header(path)
    assert (header.name, header.method, header.base, header.labels, header.digest) == (made.name, made.method, made.base, made.labels, made.digest)
    assert (header.roles, header.requires, header.card, header.context) == (made.roles, made.requires, made.card, made.context)
    assert {k: (e.dtype, e.shape) for k, e in header.tensors.items()}["head/head.bias"] == ("BF16", (3,))
    assert header.size == path.stat().st_size
    with pytest.raises(ModuleError):
        load(path)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused() -> None:
    data = bytearray(dumps(module(tensors=SMALL, card=Card(title="x"))))
    reasons = set()
    for position in range(len(data)):
        for mask in (1 << position % 8, 0x20, 0xFF):
            data[position] ^= mask
            with pytest.raises(ModuleError) as caught:
                loads(bytes(data), source="m.safetensors")
            data[position] ^= mask
            assert str(caught.value).startswith("module file m.safetensors: ") and len(str(caught.value)) < 500
            reasons.add(str(caught.value).split(": ")[1][:12])
    loads(bytes(data))
    assert "damaged" in reasons


def test_every_truncation_is_refused_with_both_sizes() -> None:
    data = dumps(module(tensors=SMALL))
    total, header = len(data), 8 + int.from_bytes(data[:8], "little")
    for size in range(total):
        with pytest.raises(ModuleError) as caught:
            loads(data[:size])
        expected = "empty" if size == 0 else f"{size:,} of at least {8 if size < 8 else header:,} bytes" if size < header else f"{size:,} of {total:,} bytes"
        assert expected in str(caught.value)


@given(st.binary(min_size=1, max_size=40))
def test_appended_bytes_are_refused(extra: bytes) -> None:
    with pytest.raises(ModuleError, match=f"{len(extra)} bytes too many"):
        loads(FILE + extra)


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModuleError):
        loads(data)
    with pytest.raises(ModuleError):
        loads(container(b"{" + data))


@given(st.data())
@settings(deadline=None)
def test_random_edits_of_a_valid_header_raise_nothing_else(data: st.DataObject) -> None:
    """With a right checksum, any JSON value anywhere in the header loads as a module or raises ModuleError."""

    def edit(header: dict[str, Any]) -> None:
        place = data.draw(st.sampled_from([header, header["__metadata__"], header["head/head.bias"]]))
        key = data.draw(st.sampled_from(sorted(place)))
        values = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers(-3, 50), max_size=3)
        values |= st.sampled_from(["{}", "[]", "null", '{"type":"method"}', "[[[[1]]]]", "NaN", '"x"', "1e400", '{"a":1,"a":2}'])
        place[key] = data.draw(values)

    try:
        loads(forge(FILE, edit))
    except ModuleError as error:
        assert len(str(error)) < 900


def test_forging_works() -> None:
    assert forge(FILE, lambda h: None) == FILE
    same(loads(forge(FILE, lambda h: h["__metadata__"].update(name="x"))), module(name="x"))


META = "__metadata__"


def set_meta(key: str, value: Any) -> Any:
    return lambda header: header[META].update({key: value})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (set_meta("version", "3"), "reads up to 2: it needs intarsia >= 0.1 (pip install -U intarsia)"),
        (lambda h: h[META].update(version="7", needs="9.3.1"), "format version 7, this intarsia reads up to 2: it needs intarsia >= 9.3.1"),
        (lambda h: h[META].update(version="7", needs="\x1b[31m$(rm)"), "it needs a newer intarsia (pip"),
        (lambda h: h[META].update(version="7", anything="new"), "format version 7"),
        (lambda h: (h[META].update(version="7"), h["head/head.bias"].update(dtype="F4")), "format version 7"),
        (set_meta("version", "0"), "version is '0'"),
        (set_meta("version", "1.0"), "version is '1.0'"),
        (set_meta("format", "pt"), "not an intarsia module: its metadata says format 'pt'"),
        (lambda h: h.pop(META), "not an intarsia module: its metadata names no format"),
        (set_meta("pickle", "x"), "unknown entries 'pickle' in the metadata"),
        (lambda h: h[META].pop("labels"), "missing entries labels in the metadata"),
        (set_meta("name", "../x"), "looks like a path"),
        (set_meta("name", "a\0b"), "U+0000"),
        (set_meta("name", 3), "not an object of strings"),
        (set_meta("labels", '["a","a"]'), "stand twice"),
        (set_meta("labels", '{"a":1}'), "$.labels: expected a tuple of str or None"),
        (set_meta("method", '{"type":"os.system","cmd":"x"}'), "$.method: unknown type 'os.system'"),
        (set_meta("method", '{"type":"card"}'), "$.method: expected {'type': 'method', ...}, found type 'card'"),
        (set_meta("method", "[]"), "the method is not a JSON object"),
        (set_meta("method", "{"), "method: Expecting property name"),
        (set_meta("card", '{"type":"card","title":1}'), "$.card.title: expected str"),
        (set_meta("base", '{"nonsense":1}'), "fingerprint"),
        (set_meta("base", "7"), "fingerprint"),
        (set_meta("roles", '{"a":1}'), "$.roles.a: expected str"),
        (set_meta("requires", '["x"]'), "not a digest"),
        (set_meta("digest", "ab" * 32), "do not match the digest"),
        (set_meta("context", '{"prefix":"passage: "}'), "do not match the digest"),
        (lambda h: h["head/head.bias"].update(dtype="F16"), "do not match the digest"),
        (lambda h: h["head/head.bias"].update(shape=[1, 3]), "do not match the digest"),
        (lambda h: h["head/head.bias"].update(dtype="F8_E4M3"), "dtype 'F8_E4M3'; allowed are F64, F32"),
        (lambda h: h["head/head.bias"].update(dtype=["F16"]), "dtype"),
        (lambda h: h["head/head.bias"].update(shape=[4]), "needs 8 bytes, its data_offsets hold 6"),
        (lambda h: h["head/head.bias"].update(shape=[2**48]), "sizes below 2**48"),
        (lambda h: h["head/head.bias"].update(shape=[2**32, 2**32]), "needs 36,893,488,147,419,103,232 bytes"),
        (lambda h: h["head/head.bias"].update(shape=[2**47] * 8), "needs "),
        (lambda h: h["head/head.bias"].update(shape=[1] * 9 + [3]), "at most 8 sizes"),
        (lambda h: h["head/head.bias"].update(shape=[-3]), "at most 8 sizes"),
        (lambda h: h["head/head.bias"].update(shape=[3.0]), "at most 8 sizes"),
        (lambda h: h["head/head.bias"].update(shape=[True, 3]), "at most 8 sizes"),
        (lambda h: h["head/head.bias"].update(data_offsets=[6, 0]), "expected [begin, end]"),
        (lambda h: h["head/head.bias"].update(data_offsets=[0, 6]), "overlaps"),
        (lambda h: h["head/head.bias"].update(data_offsets=[82, 88]), "gap"),
        (lambda h: h["head/head.bias"].update(extra=1), "exactly dtype, shape and data_offsets"),
        (lambda h: h["head/head.bias"].pop("shape"), "exactly dtype, shape and data_offsets"),
        (lambda h: h.update({"head/head.bias": [1]}), "exactly dtype, shape and data_offsets"),
        (lambda h: h.update({"../x": h.pop("head/head.bias")}), "<site>/<patch>"),
        (lambda h: h.pop("head/head.bias"), "gap"),
        (lambda h: h.pop("tied/shared.mask"), "bytes too many"),
    ],
)
def test_hostile_headers_are_refused(edit: Any, words: str) -> None:
    with pytest.raises(ModuleError) as caught:
        loads(forge(FILE, edit))
    assert words in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (container(b"[]"), "does not begin with '{'"),
        (container(b""), "does not begin with '{'"),
        (container(b' {"a":1}'), "does not begin with '{'"),
        (container({}), "names no format"),
        (container({"a/b": 3}), "names no format"),
        (container(b'{"a/b":{},"a/b":{}}'), "'a/b' stands twice"),
        (container(b'{"__metadata__":{"a":"","a":""}}'), "'a' stands twice"),
        (container(b'{"__metadata__":{},"__metadata__":{}}'), "stands twice"),
        (container(b'{"__metadata__":[]}'), "not an object of strings"),
        (container(b'{"a":\xff}'), "not UTF-8 at byte 5"),
        (container(b"{}", length=2**62), "at most 4,194,304 are allowed"),
        (container(b"{}", length=2**64 - 1), "at most 4,194,304 are allowed"),
        (container(b"{}", length=3), "10 of at least 11 bytes"),
    ],
)
def test_hostile_containers_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(ModuleError) as caught:
        loads(data)
    assert words in str(caught.value)


def test_a_bool_is_zero_or_one() -> None:
    damaged = bytearray(FILE)
    assert damaged[-3:] == b"\x01\x00\x01"
    damaged[-1] = 2
    with pytest.raises(ModuleError, match="BOOL but holds bytes other"):
        loads(bytes(damaged))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused_on_save_and_load(value: float, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tensors()
    bad["0.ffn/x.a"] = torch.zeros(4, 3, dtype=dtype)
    bad["0.ffn/x.a"][2, 1] = value
    made = module(tensors=bad)
    message = r"'0.ffn/x.a': 1 of 12 values are NaN or infinite, the first at \(2, 1\)"
    with pytest.raises(ModuleError, match=message):
        save(made, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr(file, "check_finite", lambda tensors: None)
        data = dumps(made)
    with pytest.raises(ModuleError, match=message):
        loads(data)


# --- other files ------------------------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_are_recognised_and_never_opened(tmp_path: Path, protocol: int) -> None:
    import pickle

    canary, path = tmp_path / "executed", tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"x": Canary(str(canary))}, protocol=protocol))
    with pytest.raises(ModuleError, match="not a module file"):
        load(path)
    if protocol >= 2:
        with pytest.raises(ModuleError, match=r"a Python pickle\. intarsia never opens pickles"):
            load(path)
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_recognised_and_never_opened(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "executed", tmp_path / "m.bin"
    torch.save({"x": Canary(str(canary))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModuleError, match=r"never opens pickles.*re-save"):
        load(path)
    assert not canary.exists()


def test_a_plain_safetensors_file_is_no_module(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a/b": torch.ones(2)}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModuleError, match="a safetensors file, but not an intarsia module: its metadata says format 'pt'"):
        load(tmp_path / "adapter_model.safetensors")
    save_file({"base.layer.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModuleError, match="a safetensors file, but not an intarsia module"):
        load(tmp_path / "adapter_model.safetensors")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    save(module(), tmp_path / "swahili.safetensors")
    with pytest.raises(StoreError, match=r"no such file: .*; did you mean 'swahili.safetensors'"):
        load(tmp_path / "swahil.safetensors")
    with pytest.raises(StoreError, match="it is a folder"):
        load(tmp_path)
    with pytest.raises(StoreError, match="null"):
        load(f"{tmp_path}/a\0b")
    with pytest.raises(StoreError, match="no such file"):
        load(tmp_path / "none" / "m.safetensors")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):  # and does not wait for a writer
        load(tmp_path / "pipe")
    with pytest.raises(StoreError, match="not a regular file"):
        load("/dev/zero")
    (tmp_path / "link").symlink_to(tmp_path / "swahili.safetensors")
    same(load(tmp_path / "link"), module())


# --- bombs ------------------------------------------------------------------------------------------------------------

def bombs() -> dict[str, bytes]:
    """Files that make a careless reader allocate."""
    limit = 4 * 2**20
    entry = '"%07d/x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    filled = ",".join(entry % i for i in range(60_000))
    return {
        "header-length": container(b"{}", length=2**40),
        "header-too-long": container(b"{" + b" " * limit + b"}"),
        "many-tensors": container(("{" + filled[:limit - 10].rpartition(",")[0] + "}").encode()),
        "many-lists": container(b'{"__metadata__":[' + b"[]," * 1_300_000 + b"[]]}"),
        "many-numbers": container(b'{"__metadata__":[' + b"1," * 2_000_000 + b"1]}"),
        "deep-lists": container(b'{"a":' + b"[" * 390_000),
        "deep-in-text": container({META: {"format": "intarsia-module", "method": "[" * 300_000}}),
        "long-key": container(b'{"' + b"a" * (limit - 10) + b'":1}'),
        "long-number": container(b'{"a":' + b"9" * (limit - 10) + b"}"),
        "huge-tensor": container({"a/b": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}),
        "huge-product": container({"a/b": {"dtype": "F32", "shape": [2**47] * 8, "data_offsets": [0, 4]}}, b"1234"),
        "long-shape": container({"a/b": {"dtype": "F32", "shape": [1] * 300_000, "data_offsets": [0, 4]}}, b"1234"),
        "spaces": container(b"{" + b" " * (limit - 2) + b"}"),
    }  # fmt: skip


def test_bombs_are_refused_quickly_and_without_memory(tmp_path: Path) -> None:
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)

    def defuse() -> list[Any]:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
        rows, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in bombs():
            start = time.process_time()
            try:
                load(tmp_path / name)
                result = "loaded"
            except (ModuleError, MemoryError) as error:
                result = type(error).__name__
            rows.append([name, result, time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024])
        return rows

    for name, result, seconds, megabytes in forked(defuse):
        assert result == "ModuleError" and seconds < 0.3 and megabytes < 60, (name, result, seconds, megabytes)


def test_what_a_reader_refuses_is_not_written() -> None:
    with pytest.raises(ModuleError, match="at most 4,194,304 are allowed"):
        dumps(module(card=Card(description="x" * 900_000, intended_use="ŋ" * 900_000, out_of_scope="é" * 900_000)))
    many = {f"{i}.ffn/x.a": torch.zeros(0) for i in range(20_001)}
    with pytest.raises(ModuleError, match="at most 20,000 are allowed"):
        dumps(module(tensors=many))


def test_the_largest_allowed_number_of_tensors_works() -> None:
    many = {f"{i}.ffn.down/adapter.w": torch.zeros(1) for i in range(20_000)}
    made = module(tensors=many)
    assert loads(dumps(made)) == made


def test_shuffled_header_of_equal_meaning_is_not_the_same_file() -> None:
    """Only one text per module: reordering the header needs a new checksum, and then still gives the same module."""

    def shuffle(header: dict[str, Any]) -> None:
        items = list(header.items())
        random.Random(1).shuffle(items)
        header.clear()
        header.update(items)

    other = forge(FILE, shuffle)
    assert other != FILE and loads(other) == module() and dumps(loads(other)) == FILE


def test_another_base_is_another_module() -> None:
    assert loads(dumps(module(base=base("bb")))).base == base("bb")
