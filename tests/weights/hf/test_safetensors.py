"""Malformed files and directories that lead elsewhere are refused by name before a tensor is read."""

import json
import pickle
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from ftjax.errors import UserError
from ftjax.weights.hf.files import MAX_JSON_BYTES
from ftjax.weights.hf.safetensors import SafetensorsFile, SafetensorsReader

BYTES = bytes(range(16))


def entry(begin: int, end: int, **changes) -> dict:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]} | changes


def file_of(header: dict | bytes, body: bytes = BYTES, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def twice(first: dict, second: dict) -> bytes:
    return f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'.encode()


MALFORMED = {
    "empty": b"",
    "shorter than a length": b"1234",
    "truncated": file_of({"a": entry(0, 16)}, BYTES[:8]),
    "trailing bytes": file_of({"a": entry(0, 16)}, BYTES + b"x"),
    "hole": file_of({"a": entry(0, 4), "b": entry(8, 16)}),
    "hole at the start": file_of({"a": entry(8, 16)}),
    "overlap": file_of({"a": entry(0, 12), "b": entry(8, 16)}),
    "two names for the same bytes": file_of({"a": entry(0, 16), "b": entry(0, 16)}),
    "header over the limit": file_of({"a": entry(0, 16)}, length=MAX_JSON_BYTES + 1),
    "header of 2^64 bytes": file_of({"a": entry(0, 16)}, length=2**64 - 1),
    "header not JSON": file_of(b"weights!"),
    "header not UTF-8": file_of(b'{"\xff": 1}'),
    "header a list": file_of(b"[]", b""),
    "deep JSON": file_of(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "deep JSON in a tensor": file_of(b'{"a": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", b""),
    "tensor named twice": file_of(twice(entry(0, 16), entry(0, 16))),
    "tensor named twice, differently": file_of(twice(entry(0, 8), entry(0, 16))),
    "field named twice": file_of(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'),
    "shape that does not fit": file_of({"a": entry(0, 16, shape=[3])}),
    "negative shape": file_of({"a": entry(0, 16, shape=[-4])}),
    "overflowing shape": file_of({"a": entry(0, 16, shape=[2**62, 2**62])}),
    "unknown type": file_of({"a": entry(0, 16, dtype="X9")}),
}


def test_the_wellformed_one_is_read(tmp_path):
    """So that the cases below fail for what they say and not for how they are made."""
    (tmp_path / "a.safetensors").write_bytes(file_of({"a": entry(0, 16)}))
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.names() == {"a"}
    assert file.read("a").tobytes() == BYTES


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: not a valid safetensors file"):
        SafetensorsFile(path)


PEAK = """
import pathlib, sys
from ftjax.weights.hf.files import read_json
from ftjax.weights.hf.files import MAX_JSON_BYTES
from ftjax.weights.hf.safetensors import SafetensorsFile, UserError
status = pathlib.Path("/proc/self/status")
def peak(): return int(status.read_text().split("VmHWM:")[1].split()[0])
before = peak()
try:
    (read_json if sys.argv[1].endswith("json") else SafetensorsFile)(pathlib.Path(sys.argv[1]))
except UserError as error:
    print(error)
print(before, peak())
"""


def opened_alone(path) -> tuple[str, int, int]:
    """What a process of its own says, and its peak RSS in kB before and after it opened the file.

    `ru_maxrss` would carry over that of the pytest that started it.
    """
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True, timeout=120)
    said, _, figures = done.stdout.strip().rpartition("\n")
    return said, *map(int, figures.split())


def test_a_header_over_the_limit_is_never_read(tmp_path, record_figure):
    """A whole header of 200 MB, not only a length that says so."""
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    said, before, after = opened_alone(path)
    record_figure("additional peak kB", after - before)
    assert "header too large: 200000000 bytes, over the limit of 32000000" in said
    assert after - before < 20_000


LARGEST = MAX_JSON_BYTES - 1000
EMPTY = b'"dtype":"U8","shape":[0],"data_offsets":[0,0]'
HEAVY = {
    "tensors.safetensors": lambda: b"{" + b",".join(b'"%x":{%s}' % (i, EMPTY) for i in range(LARGEST // 56)) + b"}",
    "metadata.safetensors": lambda: (
        b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(LARGEST // 12)) + b"}}"
    ),
    "lists.safetensors": lambda: b'{"a":{"x":[' + b"[]," * (LARGEST // 3) + b"0]," + EMPTY + b"}}",
    "dimensions.safetensors": lambda: (
        b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"0," * (LARGEST // 2) + b"0]}}"
    ),
    "lists.json": lambda: b'{"a":[' + b"[]," * (LARGEST // 3) + b"0]}",
    "objects.json": lambda: b"{" + b",".join(b'"%x":{"":0}' % i for i in range(LARGEST // 16)) + b"}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEAVY)
def test_the_heaviest_json_within_the_limit_takes_less_than_a_gigabyte(tmp_path, record_figure, name):
    text = HEAVY[name]()
    assert 0.8 * MAX_JSON_BYTES < len(text) <= MAX_JSON_BYTES
    (tmp_path / name).write_bytes(text if name.endswith("json") else struct.pack("<Q", len(text)) + text)
    _, _, peak = opened_alone(tmp_path / name)
    record_figure("peak kB", peak)
    assert peak < 1_000_000


def test_slices_are_read_in_the_type_of_the_file(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    stored = {kind: whole.astype(kind) for kind in ("float32", "float16", ml_dtypes.bfloat16, "int8")}
    save_file({str(np.dtype(kind)): array for kind, array in stored.items()}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert len(file.names()) == 4
    for kind, array in stored.items():
        name = str(np.dtype(kind))
        assert file.dtype(name) == array.dtype
        assert file.shape(name) == (4, 6)
        np.testing.assert_array_equal(file.read(name), array)
        np.testing.assert_array_equal(file.read(name, (slice(1, 3),)), array[1:3])
        np.testing.assert_array_equal(file.read(name, (slice(None), slice(2, 5))), array[:, 2:5])
        assert file.read(name).dtype == array.dtype


def test_any_part_of_a_tensor_is_read(tmp_path):
    """Parts in every dimension, far enough apart to be skipped (1 kB and more) and near enough not to be."""
    rng = np.random.default_rng(0)
    arrays = {
        "flat": rng.random(5000),
        "wide": rng.random((3, 2000)),
        "deep": rng.random((4, 5, 6, 7)).astype(np.float32),
        "long": rng.integers(0, 99, (3000, 2, 3), dtype=np.int8),
        "none": np.zeros((3, 0, 2)),
        "one": np.array(3, np.float32),
    }
    save_file(arrays, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        for _ in range(50):
            ends = [np.sort(rng.integers(0, size + 1, 2)).tolist() for size in array.shape]
            index = tuple(slice(*(pair if rng.random() < 0.7 else [None])) for pair in ends)
            index = index[: rng.integers(0, len(index) + 1)]
            np.testing.assert_array_equal(file.read(name, index), array[index], str(index))
    with pytest.raises(ValueError, match="does not select a part"):
        file.read("flat", (slice(0, 10, 2),))
    with pytest.raises(ValueError, match="does not select a part"):
        file.read("flat", (slice(None), slice(None)))


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(1000, np.float32)}, path)
    file = SafetensorsFile(path)
    with open(path, "r+b") as same:
        same.truncate(2000)
    with pytest.raises(UserError, match="has become shorter since it was opened"):
        file.read("a")


@pytest.fixture
def model(tmp_path):
    """A directory with an index and two shards, intact until a test changes it."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.ones(4, np.float32)}, directory / "one.safetensors")
    save_file({"b": np.ones(4, np.float32)}, directory / "two.safetensors")
    index(directory, {"a": "one.safetensors", "b": "two.safetensors"})
    assert SafetensorsReader(directory).names() == {"a", "b"}
    return directory


def index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_outside_the_directory(model):
    outside = model.parent / "outside.safetensors"
    save_file({"b": np.ones(4, np.float32)}, outside)
    for name in (
        "../outside.safetensors",
        str(outside),
        "x/../../outside.safetensors",
        "..\\outside.safetensors",
    ):
        index(model, {"a": "one.safetensors", "b": name})
        with pytest.raises(UserError, match="outside the directory"):
            SafetensorsReader(model)


@pytest.mark.parametrize("name", ["two.safetensors", "model.safetensors.index.json", "config.json"])
def test_symlinks_out_of_the_directory(model, name):
    moved = model.parent / name
    (model / name).rename(moved)
    (model / name).symlink_to(moved)
    with pytest.raises(UserError, match=f"{name}: a symlink that leads out"):
        SafetensorsReader(model)


def test_symlinks_of_the_hub_cache_are_followed(model, tmp_path):
    """hub/models--org--name/snapshots/REVISION/file -> ../../blobs/HASH, and to no other place."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert SafetensorsReader(snapshot).names() == {"a", "b"}

    other = tmp_path / "hub" / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    target = (snapshot / "two.safetensors").resolve()
    target.rename(other / "x")
    (snapshot / "two.safetensors").unlink()
    (snapshot / "two.safetensors").symlink_to(other / "x")
    with pytest.raises(UserError, match="leads out"):
        SafetensorsReader(snapshot)


def test_index_and_shards_that_differ(model):
    index(model, {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(UserError, match=r"b \(only in two.*\n.*c \(absent from two"):
        SafetensorsReader(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "two members are called 'a'"),
        ('{"weight_map": ["one.safetensors"]}', "lacks `weight_map`"),
        ('{"weight_map": {"a": 1}}', "lacks `weight_map`"),
        ("{}", "lacks `weight_map`"),
        ("[]", "where an object is expected"),
        ("[" * 100_000, "not a readable JSON file"),
        ('{"weight_map": {"a": "three.safetensors"}}', "three.safetensors is missing"),
        ('{"weight_map": {"a": "weights.bin"}}', "only .safetensors files are read"),
    ],
)
def test_malformed_indexes(model, text, message):
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        SafetensorsReader(model)


class Trap:
    """A pickle that creates a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_refused_unopened(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=rf"{name}.*convert them to safetensors"):
        SafetensorsReader(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_code_beside_a_model_is_not_run(model):
    (model / "config.json").write_text('{"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd"}}')
    (model / "odd.py").write_text(f"open({str(model / 'sprung')!r}, 'w')")
    assert SafetensorsReader(model).config["model_type"] == "odd"
    assert not (model / "sprung").exists()


def test_neither_weights_nor_index(model):
    (model / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"neither model.safetensors nor"):
        SafetensorsReader(model)
