"""Whatever is done to safetensors and index files, a model loads with its own values or is refused as a UserError."""

import json
import random
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save
from support.llama_dirs import abstract
from support.tiny import CONFIG

from ftjax.errors import UserError
from ftjax.models.families import spec_from_config
from ftjax.weights import load as loading
from ftjax.weights.hf.keys import hf_names
from ftjax.weights.source import open_source

ONE_LAYER = CONFIG | {
    "num_hidden_layers": 1,
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "head_dim": 2,
}
SPEC = spec_from_config(ONE_LAYER)
SHARDS = ("model-1.safetensors", "model-2.safetensors")
INDEX = "model.safetensors.index.json"
# Where a number belongs, or a name.
ODD = (0, 1, -1, 3, 2**31, 2**53, 2**63 - 1, 2**64 - 1, 2**64, 10**30, -(10**30), 1.5, 1e300, True, None, "4", [], {})


class Model:
    """A directory with an index, two shards, links that lead out of it, and other weights beside it."""

    def __init__(self, root: Path):
        self.path = root / "model"
        self.path.mkdir()
        rng = np.random.default_rng(0)
        shapes = {name: key.shape for key in hf_names(SPEC).values() for name in key.names()}
        self.tensors = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        names = sorted(self.tensors)
        parts = [{name: self.tensors[name] for name in names[half::2]} for half in range(2)]
        weight_map = {name: shard for shard, part in zip(SHARDS, parts) for name in part}
        self.files = {shard: save(part, {"format": "pt"}) for shard, part in zip(SHARDS, parts)}
        self.files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
        (self.path / "config.json").write_text(json.dumps(ONE_LAYER))
        (root / "outside.safetensors").write_bytes(save({name: array + 1 for name, array in parts[1].items()}))
        (self.path / "link.safetensors").symlink_to(root / "outside.safetensors")
        (self.path / "up").symlink_to(root)
        (self.path / "loop.safetensors").symlink_to(self.path / "loop.safetensors")
        (self.path / "directory.safetensors").mkdir()
        self._there = {}

    def load(self, files: dict[str, bytes]) -> dict[str, np.ndarray]:
        """{name: values} from the directory with these files."""
        for name, content in files.items():
            if self._there.get(name) is not content:
                (self.path / name).write_bytes(content)
        self._there = files
        reader = open_source(self.path)
        return loading.load_params(reader, spec_from_config(reader.config), abstract_params)


abstract_params = abstract(SPEC)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Its `load` returns what is read, as it would be placed; to place it would take most of the time."""
    read = {}

    def filled(leaf, tensor, depth, transposed):
        shape = leaf.shape[depth:][:: -1 if transposed else 1]
        for place in np.ndindex(leaf.shape[:depth]):
            read[len(read)] = tensor(place, tuple(slice(0, size) for size in shape))

    monkeypatch.setattr(loading, "filled", filled)
    made = Model(tmp_path)
    plain = made.load

    def load_and_collect(files):
        read.clear()
        plain(files)
        return list(read.values())

    made.load = load_and_collect
    made.expected = made.load(made.files)
    flat = {array.tobytes() for array in made.tensors.values()}
    assert len(made.expected) == len(made.tensors)
    assert {array.tobytes() for array in made.expected} == flat
    return made


# How a file of bytes goes wrong. Each takes (random, content) and returns the content changed.


def flip(rng: random.Random, content: bytes) -> bytes:
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        # Mostly where the structure is: the data of a tensor may hold anything.
        at = rng.randrange(min(len(out), rng.choice((8, 64, 600, len(out)))))
        out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(min(len(content), rng.choice((8, 600, len(content)))) + 1)
    more = rng.choice((b" ", b"\0", b"\xff", b'"', b"{", b"[" * 3000, b",", rng.randbytes(rng.randrange(1, 40))))
    return content[:at] + more + content[at:]


def delete(rng: random.Random, content: bytes) -> bytes:
    at, count = rng.randrange(min(len(content), 600)), rng.randrange(1, 30)
    return content[:at] + content[at + count :]


def header_length(rng: random.Random, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    lies = (0, 1, length - 1, length + 1, length + 8, len(content), 10**7, 32_000_001, 10**8, 2**32, 2**63, 2**64 - 1)
    return struct.pack("<Q", rng.choice(lies)) + content[8:]


def with_header(change: Callable[[random.Random, dict], dict | bytes]) -> Callable[[random.Random, bytes], bytes]:
    """The header, as a dict, changed and put back with its true length."""

    def mutate(rng: random.Random, content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = change(rng, json.loads(content[8 : 8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    mutate.__name__ = change.__name__
    return mutate


def tensor_of(rng: random.Random, header: dict) -> str:
    return rng.choice([name for name in header if name != "__metadata__"])


@with_header
def offsets(rng: random.Random, header: dict) -> dict:
    entry = header[tensor_of(rng, header)]
    other = header[tensor_of(rng, header)]["data_offsets"]
    entry["data_offsets"] = rng.choice(
        (
            list(other),
            entry["data_offsets"][::-1],
            [end + rng.choice((-4, -1, 1, 4, 2**40)) for end in entry["data_offsets"]],
            [entry["data_offsets"][0], rng.choice(ODD)],
            [rng.choice(ODD), entry["data_offsets"][1]],
            [],
            [0, 4, 8],
            rng.choice(ODD),
        )
    )
    return header


@with_header
def shape(rng: random.Random, header: dict) -> dict:
    entry = header[tensor_of(rng, header)]
    own = entry["shape"]
    entry["shape"] = rng.choice(
        (own[::-1], [*own, 1], [1, *own], own[1:], [-size for size in own], [rng.choice(ODD), *own[1:]],
         [2**32, 2**32], [0, *own], rng.choice(ODD), [1] * 100_000)
    )  # fmt: skip
    return header


@with_header
def kind(rng: random.Random, header: dict) -> dict:
    kinds = ("F64", "F16", "BF16", "I32", "U32", "F8_E4M3", "F4", "f32", "", "F32 ", "X" * 10_000, "\ud800", *ODD)
    header[tensor_of(rng, header)]["dtype"] = rng.choice(kinds)
    return header


@with_header
def entries(rng: random.Random, header: dict) -> dict:
    """Entries removed, added, renamed, of another type, with another field."""
    name = tensor_of(rng, header)
    what = rng.randrange(7)
    if what == 0:
        del header[name]
    elif what == 1:
        header[rng.choice(("new", "", "\0", "é", "x" * 100_000))] = header[name]
    elif what == 2:
        header[rng.choice((name + " ", name.upper(), "__metadata__", tensor_of(rng, header)))] = header.pop(name)
    elif what == 3:
        header[name] = rng.choice((*ODD, "F32"))
    elif what == 4:
        del header[name][rng.choice(("dtype", "shape", "data_offsets"))]
    elif what == 5:
        header[name]["more"] = rng.choice((*ODD, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}))
    else:
        header["__metadata__"] = rng.choice(({"a": rng.choice(ODD)}, {}, *ODD, {"dtype": "F32", "shape": "x"}))
    return header


@with_header
def text(rng: random.Random, header: dict) -> bytes:
    """Headers that are no longer the JSON of an object, or that repeat a key, or say the same otherwise."""
    plain = json.dumps(header)
    name = tensor_of(rng, header)
    again = f'"{name}": {json.dumps(header[name])}'
    escaped = "".join(f"\\u{ord(c):04x}" for c in name)
    return rng.choice(
        (
            plain[:-1] + f", {again}" + "}",
            plain[:-1] + f", {again.replace(name, escaped, 1)}" + "}",
            plain.replace('"dtype"', '"dtype": "F32", "dtype"', 1),
            plain.replace(name, escaped),
            plain[:-1] + ', "__metadata__": {}}',
            plain[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
            plain[:-1] + ', "deep": ' + '{"a":' * 50_000 + "0" + "}" * 50_000 + "}",
            plain + " " * rng.randrange(1, 100),
            " " + plain,
            plain + "\0",
            plain + plain,
            f"[{plain}]",
            "null",
            "",
            "\ufeff" + plain,
            plain.replace("[0", "[0.0", 1),
            plain.replace("[0", "[00", 1),
            plain.replace("[0", "[NaN", 1),
            plain.replace("[0", "[" + "9" * 5000, 1),
            plain.replace("[0", "[-0", 1),
            plain.replace("[0", "[0e0", 1),
        )
    ).encode()


# How an index goes wrong.

PLACES = (
    "../outside.safetensors", "up/outside.safetensors", "link.safetensors", "loop.safetensors", "directory.safetensors",
    "./model-2.safetensors", "directory.safetensors/../model-2.safetensors", "..\\outside.safetensors", "/etc/passwd",
    "missing.safetensors", "config.json", "", ".", "/", "~/x.safetensors", "model-2.safetensors/", "a\0b.safetensors",
    "\ud800.safetensors", "x" * 300 + ".safetensors", "x/" * 3000 + "y.safetensors", "MODEL-2.safetensors",
    "model-1.safetensors", "%2e%2e/outside.safetensors", "file:///outside.safetensors", "model.bin", *ODD[6:],
)  # fmt: skip


def weight_map(rng: random.Random, content: bytes) -> bytes:
    index = json.loads(content)
    names = index["weight_map"]
    name, what = rng.choice(list(names)), rng.randrange(8)
    place = rng.choice((*PLACES, str(Path.cwd() / "outside.safetensors")))
    if what < 3:
        names[name] = place
    elif what == 3:
        index["weight_map"] = {n: place if old == SHARDS[1] else old for n, old in names.items()}
    elif what == 4:
        del names[name]
    elif what == 5:
        names[rng.choice(("new", "", "\ud800", "x" * 100_000, name + " "))] = rng.choice((SHARDS[0], place))
    elif what == 6:
        index["weight_map"] = rng.choice((*ODD, [names], {"weight_map": names}, list(names.items())))
    else:
        index = rng.choice((*ODD, [index], {"weight_map": names, "metadata": rng.choice(ODD)}, {}))
    return json.dumps(index).encode()


def index_text(rng: random.Random, content: bytes) -> bytes:
    plain = content.decode()
    (name, shard), *_ = json.loads(plain)["weight_map"].items()
    return rng.choice(
        (
            plain[:-2] + f', "{name}": "{shard}"' + "}}",
            plain[:-1] + ', "weight_map": {}}',
            plain[:-1] + ', "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
            plain[:-1] + ', "n": ' + "9" * 5000 + "}",
            plain + "\n",
            plain + "x",
            "\ufeff" + plain,
            plain.encode("utf-16").decode("latin1"),
            "",
        )
    ).encode()


BYTES = (flip, truncate, insert, delete)
SHARD_MUTATIONS = (*BYTES, header_length, offsets, shape, kind, entries, text, offsets, shape, text)
INDEX_MUTATIONS = (*BYTES, weight_map, index_text, weight_map, weight_map)


def mutant(files: dict[str, bytes], seed: int) -> tuple[str, dict[str, bytes]]:
    rng = random.Random(seed)
    changed = rng.choice((*SHARDS, INDEX))
    mutate = rng.choice(INDEX_MUTATIONS if changed == INDEX else SHARD_MUTATIONS)
    return f"{mutate.__name__} {'of the index' if changed == INDEX else 'of a shard'}", files | {
        changed: mutate(rng, files[changed])
    }


opened: list[str] = []
watching = False


def watch(event: str, arguments: tuple) -> None:
    if watching and event == "open" and isinstance(arguments[0], str | bytes | Path):
        opened.append(arguments[0])


def fuzz(model: Model, seeds: range) -> Counter:
    """{(mutation, outcome): count}; fails at the first mutant that neither loads as it should nor is refused."""
    global watching
    outcomes: Counter = Counter()
    for seed in seeds:
        what, files = mutant(model.files, seed)
        try:
            watching = True
            loaded = model.load(files)
        except UserError as error:
            message = str(error)
            if str(model.path) not in message or not message.encode():  # UnicodeEncodeError: it cannot be printed
                raise AssertionError(f"seed {seed}: {what}: {message}") from error
            outcomes[what, "refused"] += 1
            continue
        except BaseException as error:
            error.add_note(f"seed {seed}: {what}")
            raise
        finally:
            watching = False
        by_name = {name: array for shard in SHARDS for name, array in load(files[shard]).items()}
        assert by_name.keys() == model.tensors.keys(), (seed, what)
        theirs = sorted(array.tobytes() for array in by_name.values())
        assert sorted(array.tobytes() for array in loaded) == theirs, f"seed {seed}: {what}: not what safetensors reads"
        same = all(a.tobytes() == b.tobytes() for a, b in zip(loaded, model.expected, strict=True))
        # No structure says what the values of a tensor are: only a flipped bit in them may change them.
        assert same or what == "flip of a shard", f"seed {seed}: {what}: other values"
        outcomes[what, "loaded" if same else "other values"] += 1
    return outcomes


def check(model: Model, seeds: range, record_figure) -> None:
    sys.addaudithook(watch)
    opened.clear()
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the highest RSS so far is now the present one
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    outcomes = fuzz(model, seeds)
    peak = int(status.read_text().split("VmHWM:")[1].split()[0]) - before
    totals = Counter()
    for (_, outcome), count in outcomes.items():
        totals[outcome] += count
    for outcome in ("refused", "loaded", "other values"):
        record_figure(outcome, totals[outcome])
    record_figure("additional peak kB", peak)
    assert totals.total() == len(seeds)
    assert min(totals["refused"], 20 * totals["loaded"]) > len(seeds) // 2  # both happen
    mutations = {f"{mutate.__name__} of a shard" for mutate in SHARD_MUTATIONS}
    mutations |= {f"{mutate.__name__} of the index" for mutate in INDEX_MUTATIONS}
    assert {what for what, _ in outcomes} == mutations
    assert peak < 200_000
    # Python's own files and /proc aside. What the safetensors library opens is not seen here; the weights outside the
    # directory have other values.
    mine = (str(model.path.resolve()), sys.base_prefix, sys.prefix, "/proc/")
    assert not {path for path in map(str, opened) if not str(Path(path).resolve()).startswith(mine)}


def test_malformed_files_load_as_they_were_or_are_refused(model, record_figure):
    check(model, range(1500), record_figure)


@pytest.mark.slow
def test_a_hundred_thousand_malformed_files(model, record_figure):
    check(model, range(10**6, 10**6 + 100_000), record_figure)
