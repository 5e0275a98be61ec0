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
from ftjax.weights.safetensors import SafetensorsFile, SafetensorsReader

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
    "header over 100 MB": file_of({"a": entry(0, 16)}, length=100_000_001),
    "header of 2^64 bytes": file_of({"a": entry(0, 16)}, length=2**64 - 1),
    "header not JSON": file_of(b"weights!"),
    "header not UTF-8": file_of(b'{"\xff": 1}'),
    "header a list": file_of(b"[]", b""),
    "deep JSON": file_of(b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "deep JSON in a tensor": file_of(b'{"a": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", b""),
    "tensor named twice": file_of(twice(entry(0, 16), entry(0, 16))),
    "tensor named twice, differently": file_of(twice(entry(0, 8), entry(0, 16))),
    "field named twice": file_of(
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    ),
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


def test_a_header_over_100_mb_is_never_read(tmp_path, record_figure):
    """A whole header of 200 MB, not only a length that says so.

    The peak is the process's own: `ru_maxrss` would carry over that of the pytest that started it.
    """
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)
    script = (
        "import pathlib, sys\n"
        "from ftjax.weights.safetensors import SafetensorsFile, UserError\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "def peak(): return int(status.read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "try: SafetensorsFile(pathlib.Path(sys.argv[1]))\n"
        "except UserError as error: print('header too large' in str(error), peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    refused, kilobytes = done.stdout.split()
    record_figure("additional peak kB", int(kilobytes))
    assert refused == "True"
    assert int(kilobytes) < 50_000


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
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "duplicate key 'a'"),
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
