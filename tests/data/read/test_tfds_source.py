"""Rows of TensorFlow Datasets without tensorflow: array_record files prepared by tfds itself, and TFRecord files."""

import json
import multiprocessing
import pickle
import shutil
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow
from tensorboard.summary.writer.record_writer import RecordWriter

from ftjax.data.read import tfds_source
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

ROWS = [
    {"messages": [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Grüße 🙂"}], "id": i}
    for i in range(6)
]


class FtjaxChats(tfds.core.GeneratorBasedBuilder):
    """Six conversations and in a field that chats leave alone, bytes that are not UTF-8."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = {"messages": tfds.features.Sequence({"role": text, "content": text}), "id": np.int64, "text": text}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._rows()}

    def _rows(self):
        for i, row in enumerate(ROWS):
            yield i, {**row, "text": b"caf\xe9"}

    _generate_examples = _rows


def read(source, format="messages", **options):
    return read_sources([{"source": source, "format": format, **options}])


def fields(rows):
    return [row.fields for row in rows]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.display_progress_bar(False)
    FtjaxChats(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_columns_are_renamed(data_dir):
    source, columns = f"tfds:ftjax_chats:{data_dir}", {"messages": "messages", "prompt": "id"}
    rows = read(source, columns=columns)
    assert rows.raw(2).keys() == {"messages", "prompt", "text"}
    assert rows[2].fields == read(source)[2].fields
    with pytest.raises(UserError, match=r"no column 'mesages', .*did you mean 'messages'"):
        read(source, columns={"messages": "mesages"})


@pytest.fixture(scope="module")
def tfrecord_dir(data_dir, tmp_path_factory):
    """The same data set as tensorflow would have written it: TensorBoard's writer, two shards."""
    source = data_dir / "ftjax_chats" / "1.0.0"
    target = tmp_path_factory.mktemp("tfrecord") / "ftjax_chats" / "1.0.0"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.array_record*"))
    (file,) = source.glob("*.array_record*")
    records = ArrayRecordDataSource(str(file))
    for shard, part in enumerate([range(4), range(4, 6)]):
        with (target / f"ftjax_chats-train.tfrecord-{shard:05}-of-00002").open("wb") as out:
            writer = RecordWriter(out)
            for i in part:
                writer.write(records[i])
    info = json.loads((target / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    info["splits"][0]["shardLengths"] = ["4", "2"]
    info["splits"][0]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    (target / "dataset_info.json").write_text(json.dumps(info))
    return target


def test_reads_a_prepared_data_set_by_name_and_by_directory_without_tensorflow(data_dir):
    by_name = read(f"tfds:ftjax_chats:{data_dir}")
    by_directory = read(f"tfds:{data_dir}/ftjax_chats/1.0.0")
    assert fields(by_name) == fields(by_directory)
    key = str  # tfds shuffles the rows when it prepares them
    assert sorted(fields(by_name), key=key) == [{"messages": row["messages"]} for row in ROWS]
    assert by_name[3].origin == f"tfds:ftjax_chats:{data_dir}[3]"
    assert by_name.digest() == by_directory.digest()
    assert "tensorflow" not in sys.modules


def test_reads_slices_of_a_split_and_limits(data_dir):
    name = f"tfds:ftjax_chats:{data_dir}"
    whole = fields(read(name))
    assert fields(read(name, split="train[1:3]")) == whole[1:3]
    assert fields(read(name, split="[-50%:]")) == whole[3:]
    assert len(read(name, limit=2)) == 2


def test_tfrecord_files_are_read_as_array_record_files_are(data_dir, tfrecord_dir):
    rows = read(f"tfds:{tfrecord_dir}")
    assert fields(rows) == fields(read(f"tfds:ftjax_chats:{data_dir}"))
    assert fields(rows[i] for i in (5, 0, 4)) == [rows[i].fields for i in (5, 0, 4)]
    assert fields(read(f"tfds:{tfrecord_dir}", split="train[3:5]")) == fields(rows)[3:5]
    assert fields(read(f"tfds:ftjax_chats:{tfrecord_dir.parent.parent}")) == fields(rows)
    assert rows.digest() != read(f"tfds:ftjax_chats:{data_dir}").digest()
    assert "tensorflow" not in sys.modules


def test_the_index_of_a_tfrecord_file_is_what_tensorboard_reads(tmp_path):
    records = [b"", b"a", b"x" * 5000, b"\0" * 12]
    with (tmp_path / "a.tfrecord").open("wb") as out:
        writer = RecordWriter(out)
        for record in records:
            writer.write(record)
    found = tfds_source.TfRecords([(str(tmp_path / "a.tfrecord"), 0, 4)])
    reader = pywrap_tensorflow.PyRecordReader_New(str(tmp_path / "a.tfrecord"))
    for record in found:
        reader.GetNext()
        assert record == reader.record()
    with pytest.raises(errors.OutOfRangeError):
        reader.GetNext()
    assert list(tfds_source.TfRecords([(str(tmp_path / "a.tfrecord"), 1, 2)])) == records[1:3]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: struct.pack("<Q", 2**60) + b[8:], lambda b: b"text"])
def test_a_damaged_tfrecord_file_is_refused(tfrecord_dir, tmp_path, damage):
    shutil.copytree(tfrecord_dir, tmp_path / "copy")
    first, second = sorted((tmp_path / "copy").glob("*.tfrecord*"))
    good = second.read_bytes()
    second.write_bytes(damage(good))
    with pytest.raises(UserError, match=r"tfrecord-00001-of-00002: not a TFRecord file, cut off or damaged; prepare"):
        read(f"tfds:{tmp_path / 'copy'}")
    second.write_bytes(good[: 16 + struct.unpack("<Q", good[:8])[0]])
    with pytest.raises(UserError, match=r"tfrecord-00001-of-00002: holds 1 records, not 2; prepare the data set again"):
        read(f"tfds:{tmp_path / 'copy'}")
    content = bytearray(first.read_bytes())
    content[12:60] = b"\xff" * 48
    first.write_bytes(content)
    second.write_bytes(good)
    with pytest.raises(UserError, match=r"copy\[0\]: not a record of this data set"):
        read(f"tfds:{tmp_path / 'copy'}")[0]


def _fields(rows, i):
    return rows[i].fields


def test_rows_are_read_in_other_processes(data_dir, tfrecord_dir):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for source in (f"tfds:ftjax_chats:{data_dir}", f"tfds:{tfrecord_dir}"):
            rows = read(source)
            wanted = fields(rows)
            assert fields(pickle.loads(pickle.dumps(rows))) == wanted
            assert pool.apply_async(_fields, (rows, 2)).get(60) == wanted[2]


def test_bad_names_splits_and_bytes_are_refused(data_dir, tmp_path):
    name = f"tfds:ftjax_chats:{data_dir}"
    for source, split, message in [
        (name, "test", "cannot open the split 'test'.*Check the name"),
        (name, "train[", "is no split"),
        (f"tfds:no_such_data:{data_dir}", "train", "no_such_data"),
        (f"tfds:{tmp_path}", "train", "dataset_info.json"),
    ]:
        with pytest.raises(UserError, match=message):
            read(source, split=split)
    with pytest.raises(UserError, match=r"ftjax_chats.*\[0\]: text is bytes that are not UTF-8 text; convert"):
        list(read(name, format="text"))


def test_what_needs_tensorflow_names_the_extra():
    with (
        pytest.raises(UserError, match=r"tfds:x: .*No module named 'tensorflow'.*pip install 'ftjax\[tfds-tf\]'"),
        tfds_source._explained("tfds:x", "train"),
    ):
        raise ModuleNotFoundError("No module named 'tensorflow'")
