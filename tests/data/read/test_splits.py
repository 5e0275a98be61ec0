"""Splits with slices and limits, held against Python's slices and tfds' reading of percentages."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import splits as tfds_splits

from ftjax.data.read import splits
from ftjax.data.read.sources import read_sources
from ftjax.errors import UserError


def chosen(split, n, limit=None, source="s"):
    return list(splits.select(n, splits.parse_split(split, source), limit, source))


@pytest.mark.parametrize("n", [7, 10, 101, 1000])
@pytest.mark.parametrize(
    "split", ["train", "train[:90%]", "train[90%:]", "train[-10%:]", "train[3:7]", "train[:-2]", "train[10%:40%]"]
)
def test_slices_are_those_of_tfds(split, n):
    info = tfds_splits.SplitInfo(name="train", shard_lengths=[n], num_bytes=0, filename_template=None)
    try:
        (wanted,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({"train": info})
    except ValueError:
        with pytest.raises(UserError, match=rf"^s: the split .* reaches beyond its {n} rows"):
            chosen(split, n)
        return
    rows = list(range(n)[wanted.from_ : wanted.to])
    if rows:
        assert chosen(split, n) == rows
    else:
        with pytest.raises(UserError, match=rf"^s: the split .* holds none of its {n} rows"):
            chosen(split, n)


def test_a_slice_without_a_name_is_of_train():
    assert splits.parse_split("[-10%:]", "s") == splits.SplitSlice("train", "-10%", "")
    assert splits.parse_split("train+test[5:]", "s") == splits.SplitSlice("train+test", "5", "")
    assert chosen("[:12.5%]", 80) == list(range(10))


def test_complementary_slices_meet_and_do_not_overlap():
    for n in range(1, 200):
        for percent in (10, 33, 50, 90):
            for end in (f"[{percent}%:]", f"[{percent - 100}%:]"):  # of tfds, which rounds before it subtracts
                both = []
                for split in (f"[:{percent}%]", end):
                    both += splits.parse_split(split, "s").range(n)
                assert both == list(range(n)), end


@pytest.mark.parametrize("split", ["[-150%:]", "[:101%]", "[:-101%]"])
def test_more_than_all_rows_is_refused(split):
    for n in (1, 40):
        with pytest.raises(UserError, match=f"reaches beyond its {n} rows"):
            chosen(split, n)


@pytest.mark.parametrize("split", ["", "train[", "train[5]", "train[:90]%", "train[:1.5]", "train[a:b]", "a b[", "x%"])
def test_what_is_no_split_is_refused(split):
    with pytest.raises(UserError, match=r"^s: .* is no split; write 'train', 'train\[:90%\]'"):
        splits.parse_split(split, "s")


def test_a_slice_that_holds_nothing_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"a.jsonl: the split train\[1:\] holds none of its 1 rows"):
        read_sources([{"source": str(tmp_path / "a.jsonl"), "split": "train[1:]"}])


def test_a_limit_takes_rows_from_all_over_and_the_same_ones_every_time():
    some = chosen("train", 10_000, 1000)
    assert len(some) == len(set(some)) == 1000
    assert some == sorted(some) == chosen("train", 10_000, 1000)
    counts = np.bincount(np.array(some) // 1000, minlength=10)
    assert counts.min() > 60  # 100 of each tenth are expected, with a standard deviation of 9.5
    assert set(chosen("train", 10_000, 100)) < set(some)
    assert chosen("train", 10_000, 1000, source="t") == some  # by its contents, however it is spelled
    assert set(chosen("train[:50%]", 10_000, 200)) <= set(range(5000))
    assert chosen("train", 50, 50) == chosen("train", 50, 60) == list(range(50))
