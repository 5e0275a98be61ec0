"""Hugging Face data sets that datasets itself saved, by directory, and clear refusals without a connection."""

import json
import pickle
import sys

import datasets
import pytest

from ftjax.data.read import hf_source
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def chat(i):
    return [{"role": "user", "content": f"Hi {i} é"}, {"role": "assistant", "content": f"Hello {i}"}]


def rows_of(start, stop):
    return [{"messages": chat(i), "id": i} for i in range(start, stop)]


def read(source, **options):
    return read_sources([{"source": source, **options}])


def questions(rows):
    return [row.fields["messages"][0]["content"] for row in rows]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def data():
    return datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows_of(0, 20)), test=datasets.Dataset.from_list(rows_of(20, 25))
    )


def test_reads_what_save_to_disk_wrote_with_and_without_splits(tmp_path, data):
    data.save_to_disk(tmp_path / "both")
    data["test"].save_to_disk(tmp_path / "one")
    train = read(f"hf:{tmp_path}/both")
    assert questions(train) == [f"Hi {i} é" for i in range(20)]
    assert train.sources[0].records[7] == {"messages": chat(7), "id": 7}
    assert train[7].origin == f"hf:{tmp_path}/both[7]"
    test = read(f"hf:{tmp_path}/both", split="test")
    assert questions(test) == questions(read(f"hf:{tmp_path}/one")) == [f"Hi {i} é" for i in range(20, 25)]
    assert questions(read(f"hf:{tmp_path}/both", split="train[-10%:]")) == ["Hi 18 é", "Hi 19 é"]
    assert len({train.digest(), test.digest()}) == 2
    assert pickle.loads(pickle.dumps(train))[3] == train[3]
    with pytest.raises(UserError, match="both: has the splits train, test, not 'dev'; name one of them"):
        read(f"hf:{tmp_path}/both", split="dev")
    with pytest.raises(UserError, match="one: was saved as one data set without splits; leave out 'dev'"):
        read(f"hf:{tmp_path}/one", split="dev")


def test_a_selection_that_was_saved_is_read_in_its_order(tmp_path, data):
    data["train"].select([3, 1, 19]).save_to_disk(tmp_path / "some")
    assert questions(read(f"hf:{tmp_path}/some")) == ["Hi 3 é", "Hi 1 é", "Hi 19 é"]


def test_reads_a_directory_of_data_files_by_split(tmp_path, data):
    place = tmp_path / "org" / "set"
    place.mkdir(parents=True)
    data["train"].to_parquet(place / "train-00000-of-00001.parquet")
    data["test"].to_parquet(place / "test-00000-of-00001.parquet")
    assert questions(read(f"hf:{place}")) == [f"Hi {i} é" for i in range(20)]
    assert len(read(f"hf:{place}", split="test[:40%]")) == 2
    assert len(read(f"hf:{place}", split="train+test")) == 25


def test_lists_of_messages_that_were_turned_are_turned_back_and_images_stay_closed(tmp_path):
    text = datasets.Value("string")
    features = datasets.Features(
        {"messages": {"role": datasets.List(text), "content": datasets.List(text)}, "image": datasets.Image()}
    )
    row = {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}, "image": {"bytes": b"no image"}}
    datasets.Dataset.from_list([row], features=features).save_to_disk(tmp_path / "turned")
    assert read(f"hf:{tmp_path}/turned")[0].fields["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]


def test_the_digest_follows_the_contents(tmp_path):
    digests = []
    for name, content in [("a", "x"), ("b", "x"), ("c", "y")]:
        datasets.Dataset.from_list([{"text": content}]).save_to_disk(tmp_path / name)
        digests.append(read(f"hf:{tmp_path / name}").digest())
    assert digests[0] == digests[1] != digests[2]


def test_what_cannot_be_had_is_refused_with_the_way_out(tmp_path, monkeypatch, data):
    with pytest.raises(UserError, match=r"hf:no-such-org/no-such-set: datasets cannot open .*HF_HUB_OFFLINE"):
        read("hf:no-such-org/no-such-set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^hf:\S*empty: datasets cannot open the split 'train'"):
        read(f"hf:{tmp_path}/empty")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text("not JSON\n")
    with pytest.raises(UserError, match=r"bad: datasets cannot open the split 'train'"):
        read(f"hf:{tmp_path}/bad")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"script: datasets cannot open the split 'train'"):
        read(f"hf:{tmp_path}/script")
    assert not (tmp_path / "ran").exists()
    hf_source._open.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the package datasets; pip install 'ftjax\[hf\]'"):
        read("hf:org/set")


def test_a_damaged_table_is_refused(tmp_path, data):
    data["train"].save_to_disk(tmp_path / "damaged")
    (file,) = (tmp_path / "damaged").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"damaged: datasets cannot open the split"):
        read(f"hf:{tmp_path}/damaged")
    state = tmp_path / "damaged" / "state.json"
    state.write_text(json.dumps({}))
    with pytest.raises(UserError, match=r"damaged: datasets cannot open the split"):
        read(f"hf:{tmp_path}/damaged")
