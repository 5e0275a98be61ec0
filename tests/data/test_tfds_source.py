"""Rows of TensorFlow Datasets, prepared by tfds itself in array_record files, without tensorflow."""

import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ftjax.data import rows
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


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    tfds.display_progress_bar(False)
    FtjaxChats(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


def test_reads_a_prepared_data_set_by_name_and_by_directory_without_tensorflow(data_dir):
    by_name = rows.read_rows(f"tfds:ftjax_chats:{data_dir}", format="messages")
    by_directory = rows.read_rows(f"tfds:{data_dir}/ftjax_chats/1.0.0", format="messages")
    assert [row.fields for row in by_name] == [row.fields for row in by_directory]
    key = str  # tfds shuffles the rows when it prepares them
    assert sorted((row.fields for row in by_name), key=key) == [{"messages": row["messages"]} for row in ROWS]
    assert by_name[3].origin == f"tfds:ftjax_chats:{data_dir}[3]"
    assert "tensorflow" not in sys.modules


def test_reads_a_slice_of_a_split(data_dir):
    whole = rows.read_rows(f"tfds:ftjax_chats:{data_dir}", "messages")
    some = rows.read_rows(f"tfds:ftjax_chats:{data_dir}", format="messages", split="train[1:3]")
    assert [row.fields for row in some] == [row.fields for row in whole[1:3]]


def test_bad_names_splits_and_bytes_are_refused(data_dir, tmp_path):
    name = f"tfds:ftjax_chats:{data_dir}"
    for source, split, message in [
        (name, "test", "Unknown split 'test'.*Check the name"),
        (name, "train[", "cannot open the split"),
        (f"tfds:no_such_data:{data_dir}", "train", "no_such_data"),
        (f"tfds:{tmp_path}", "train", "dataset_info.json"),
    ]:
        with pytest.raises(UserError, match=message):
            rows.read_rows(source, split=split)
    with pytest.raises(UserError, match=r"ftjax_chats.*\[0\]: text is bytes that are not UTF-8 text; convert"):
        rows.read_rows(name, format="text")
