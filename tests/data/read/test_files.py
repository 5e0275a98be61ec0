"""Paths, globs, URLs and compression: what is found, where it is unpacked, and what is refused."""

import bz2
import gzip
import json
import lzma
import os
import sys

import fsspec
import pytest
import zstandard

from ftjax import cache
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source, **options):
    return [row.fields["text"] for row in read_sources([{"source": str(source), **options}])]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/ftjax", recursive=True)


def test_a_glob_reads_its_files_in_sorted_order_whatever_their_kind(tmp_path):
    (tmp_path / "c.jsonl").write_bytes(lines("c"))
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress(lines("a1", "a2")))
    (tmp_path / "b.json").write_text(json.dumps([{"text": "b"}]))
    (tmp_path / "d.csv").write_text("text\nd\n")
    (tmp_path / "e.tsv.zst").write_bytes(zstandard.compress(b"id\ttext\n1\te\n"))
    assert texts(tmp_path / "*.*") == ["a1", "a2", "b", "c", "d", "e"]


def test_a_path_that_exists_is_itself_even_with_brackets(tmp_path):
    (tmp_path / "x[1].jsonl").write_bytes(lines("odd"))
    (tmp_path / "x1.jsonl").write_bytes(lines("other"))
    assert texts(tmp_path / "x[1].jsonl") == ["odd"]
    assert texts(tmp_path / "x[0-9].jsonl") == ["other"]


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_or_not_the_rows_their_lines_and_the_digest_are_the_same(tmp_path, suffix):
    (tmp_path / "plain.jsonl").write_bytes(lines("a", "é", "c"))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](lines("a", "é", "c")))
    plain, rows = (read_sources([{"source": str(name)}]) for name in (tmp_path / "plain.jsonl", path))
    assert [row.fields for row in rows] == [row.fields for row in plain]
    assert [row.origin for row in rows] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert rows.digest() == plain.digest()


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_files_of_several_compressed_parts_are_read_whole_and_cut_ones_refused(tmp_path, suffix, own_cache):
    pack, path = PACK[suffix], tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(lines("a")) + pack(lines("b")))
    assert texts(path) == ["a", "b"]
    noise = os.urandom(300_000).hex()
    path.write_bytes(pack(lines(noise))[:-100])
    with pytest.raises(UserError, match=rf"a.jsonl{suffix}: cut off or damaged \(.*\); copy or compress"):
        texts(path)
    path.write_bytes(b"this was never compressed")
    with pytest.raises(UserError, match="cut off or damaged"):
        texts(path)
    assert len(list(own_cache.rglob("*"))) == 2  # the directory and the good file: nothing is left of the others


def test_what_is_unpacked_is_kept_until_the_file_changes(tmp_path, own_cache):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines("a")))
    assert texts(path) == texts(path) == ["a"]
    assert len(list((own_cache / "files").iterdir())) == 1
    path.write_bytes(gzip.compress(lines("other")))
    assert texts(path) == ["other"]


def test_any_fsspec_url_is_fetched_once_and_named_in_messages(memory, own_cache):
    for name, content in {
        "a.jsonl": lines("a"),
        "b.jsonl.gz": gzip.compress(lines("b")),
        "c.csv": b"text\nc\n",
    }.items():
        memory.pipe(f"/ftjax/{name}", content)
    assert texts("memory://ftjax/*") == ["a", "b", "c"]
    assert read_sources([{"source": "memory://ftjax/a.jsonl"}])[0].origin == "memory:///ftjax/a.jsonl:1"
    assert len(list((own_cache / "files").iterdir())) == 3
    memory.pipe("/ftjax/a.jsonl", lines("a new one"))
    assert texts("memory://ftjax/a.jsonl") == ["a new one"]
    memory.pipe("/ftjax/bad.jsonl", b"x\n")
    with pytest.raises(UserError, match=r"^memory:///ftjax/bad.jsonl:1: not JSON"):
        texts("memory://ftjax/bad.jsonl")


def test_a_file_url_is_the_local_file(tmp_path, own_cache):
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    assert texts(f"file://{tmp_path}/*.jsonl") == ["a"]
    assert not own_cache.exists()


@pytest.mark.parametrize("sized", [True, False])
def test_a_source_without_a_time_of_change_is_fetched_every_time(memory, monkeypatch, sized):
    memory.pipe("/ftjax/a.jsonl", lines("one"))
    info = type(memory).info
    kept = {"name", "type"} | ({"size"} if sized else set())
    monkeypatch.setattr(
        type(memory), "info", lambda *args, **more: {k: v for k, v in info(*args, **more).items() if k in kept}
    )
    assert texts("memory://ftjax/a.jsonl") == ["one"]
    memory.pipe("/ftjax/a.jsonl", lines("two"))  # of the same size
    assert texts("memory://ftjax/a.jsonl") == ["two"]


def test_sources_that_are_not_there_or_not_read_are_refused(tmp_path, memory, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    memory.pipe("/ftjax/a.jsonl", lines("a"))
    for source, message in [
        (tmp_path / "none*.jsonl", r"none\*.jsonl: no such file; check the path or glob"),
        ("x" * 5000 + ".jsonl", "no such file; check the path"),
        (tmp_path, r"is a directory; name the files, for example .*/\*.jsonl .*hf:DIR"),
        (tmp_path / "a.txt", "a.txt: unknown ending; rows are read from .jsonl, .*.parquet"),
        ("memory://ftjax", r"memory:///ftjax: is a directory; name the files, for example memory:///ftjax/\*.jsonl"),
        ("memory://ftjax/none.jsonl", "none.jsonl: no such file; check the URL"),
        ("memory://ftjax/none*.jsonl", r"none\*.jsonl: no such file; check the URL"),
        ("nonsense://a.jsonl", "nonsense://a.jsonl: .*nonsense.*; write file://, gs://"),
    ]:
        with pytest.raises(UserError, match=message):
            texts(source)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=r"needs a package that is not installed .*pip install 'ftjax\[gcs\]'"):
        texts("gs://bucket/a.jsonl")


def test_only_slices_of_train_are_in_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*"abcdefghij"))
    assert texts(path, split="train[:30%]") == ["a", "b", "c"]
    assert texts(path, split="[-1:]") == ["j"]
    assert len(texts(path, limit=4)) == 4
    with pytest.raises(UserError, match=r"a.jsonl: a file has no split 'test'; name another file"):
        texts(path, split="test")


def test_an_unknown_format_is_refused_when_a_source_is_opened(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"not even JSON\n")
    with pytest.raises(UserError, match=r"'txet' is unknown; .*did you mean 'text'"):
        read_sources([{"source": str(tmp_path / "a.jsonl"), "format": "txet"}], max_bad_rows=5)


def test_a_cache_that_cannot_be_written_is_refused_with_the_way_out(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("a")))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/files: cannot be made .*set FTJAX_CACHE"):
        texts(tmp_path / "a.jsonl.gz")

    def full(path):
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("FTJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"No space left on device\); make room or set FTJAX_CACHE"):
        cache.file("files", "name", full)
    assert not list((tmp_path / "cache" / "files").iterdir())


def test_a_glob_that_finds_a_file_by_several_ways_reads_it_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.jsonl").write_bytes(lines("c"))
    assert texts(tmp_path / "**" / "**" / "*.jsonl") == ["c"]


def test_a_packed_file_replaced_within_the_same_size_and_time_is_unpacked_anew(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for text in ("one", "two"):
        path.write_bytes(gzip.compress(lines(text)))
        os.utime(path, ns=(10**18, 10**18))
        assert texts(path) == [text]


def test_names_that_are_not_utf_8_are_read_in_every_kind(tmp_path):
    import pandas

    for suffix in ("jsonl", "jsonl.gz"):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + suffix.encode())
        with open(path, "wb") as file:
            file.write(PACK[suffix.removeprefix("jsonl")](lines("a", "b", "c")))
        assert len(texts(path, limit=2)) == 2
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    with open(path, "wb") as file:
        pandas.DataFrame({"text": ["a", "b"]}).to_parquet(file)
    assert len(texts(path, limit=1)) == 1


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    assert texts("~/a.jsonl") == texts("~/*.jsonl") == ["a"]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACK if suffix])
def test_what_follows_the_compressed_data_and_is_none_is_refused(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](lines("a")) + b"garbage that was never compressed")
    with pytest.raises(UserError, match="cut off or damaged"):
        texts(path)


def test_xz_padding_is_no_damage(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(lines("a")) + bytes(8) + lzma.compress(lines("b")) + bytes(4))
    assert texts(path) == ["a", "b"]
