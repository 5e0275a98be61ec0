"""Signatures estimate what sets of shingles say; pairs and clusters are those that comparing all with all finds."""

import numpy as np
import pytest
from datasketch import MinHash
from support.timing import cpu_seconds

from ftjax.data.audit import duplicates

WORDS = [f"w{i}" for i in range(5000)]


def texts(count, words=100, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(count)]


def changed(text, count, rng):
    words = text.split()
    for place in rng.choice(len(words), count, replace=False):
        words[place] = str(rng.choice(WORDS))
    return " ".join(words)


def jaccard(a, b):
    sets = [{text[i : i + duplicates.SHINGLE] for i in range(len(text) - duplicates.SHINGLE + 1)} for text in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_the_jaccard_similarity_without_bias(record_figure):
    rng = np.random.default_rng(1)
    errors = []
    for text in texts(300):
        other = changed(text, int(rng.integers(1, 60)), rng)
        found = duplicates.similarity(duplicates.signature(text), duplicates.signature(other))
        errors.append(found - jaccard(text, other))
    record_figure("bias", np.mean(errors))
    record_figure("standard deviation", np.std(errors))
    assert abs(np.mean(errors)) < 0.01
    assert np.std(errors) < 0.5 / np.sqrt(duplicates.SLOTS) * 1.2


def test_case_and_white_space_make_no_difference_and_short_texts_have_signatures():
    a, b = duplicates.signature("Hello  World, again"), duplicates.signature("hello\nworld, again ")
    assert (a == b).all()
    for text in ("", "a", "1234567", "12345678"):
        assert duplicates.signature(text).shape == (duplicates.SLOTS,)
    assert duplicates.similarity(duplicates.signature("a"), duplicates.signature("b")) < 0.1


def test_keys_tell_where_one_text_ends_and_ignore_runs_of_white_space():
    assert duplicates.word_hash("a b") == duplicates.word_hash(" a \n b")
    assert duplicates.word_hash("ab", "c") != duplicates.word_hash("a", "bc")
    assert duplicates.combined_hash(1, 2) != duplicates.combined_hash(2, 1)
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 2**63, 2).tolist()) for _ in range(20_000)]
    assert len({duplicates.combined_hash(*pair) for pair in pairs}) == len(set(pairs))


def test_near_duplicates_are_found_and_different_texts_are_not(record_figure):
    rng = np.random.default_rng(2)
    originals = texts(400)
    copies = [changed(text, 2, rng) for text in originals[:200]]
    everything = originals + copies
    parents = duplicates.clusters(
        len(everything), duplicates.near_pairs(np.stack([duplicates.signature(text) for text in everything]), 0.8)
    )
    found = [parents[400 + i] == i for i in range(200) if jaccard(originals[i], copies[i]) > 0.87]
    record_figure("found of those above 0.87", np.mean(found))
    assert len(found) > 150
    assert np.mean(found) > 0.97
    assert (parents[:400] == np.arange(400)).all()
    assert all(parent in (i, i - 400) for i, parent in enumerate(parents.tolist()))


def test_pairs_across_two_sets_are_those_of_all_with_all():
    rng = np.random.default_rng(3)
    train = texts(150)
    held = [changed(train[i], 1, rng) for i in range(10)] + texts(30, seed=9)
    ours, theirs = (np.stack([duplicates.signature(text) for text in some]) for some in (held, train))
    found = {(a, b) for left, right in duplicates.near_across(ours, theirs, 0.8) for a, b in zip(left, right)}
    assert found == {(i, i) for i in range(10)}
    assert list(duplicates.near_across(ours[:0], theirs, 0.8)) == []


def test_a_thousand_alike_are_one_cluster():
    signatures = np.stack([duplicates.signature("the same sentence once more")] * 1000)
    assert set(duplicates.clusters(1000, duplicates.near_pairs(signatures, 0.9)).tolist()) == {0}


def test_the_first_of_equal_keys_is_the_earliest():
    rng = np.random.default_rng(4)
    keys = rng.integers(0, 50, 300).astype(np.uint64)
    expected = [keys.tolist().index(key) for key in keys.tolist()]
    assert duplicates.first_of_equal(keys).tolist() == expected
    assert duplicates.first_of_equal(keys[:0]).tolist() == []


def test_an_index_in_other_keys_is_that_of_the_first_equal_one():
    rng = np.random.default_rng(5)
    wanted, keys = (rng.integers(0, 90, count).astype(np.uint64) for count in (200, 100))
    others = keys.tolist()
    expected = [others.index(key) if key in others else -1 for key in wanted.tolist()]
    assert duplicates.index_in(wanted, keys).tolist() == expected
    assert duplicates.index_in(wanted, keys[:0]).tolist() == [-1] * 200


def test_signatures_are_made_several_times_faster_than_datasketchs(record_figure):
    sample = texts(200)

    def theirs(text):
        raw = text.encode()
        MinHash(num_perm=128).update_batch([raw[i : i + 8] for i in range(len(raw) - 7)])

    def seconds(function):
        return min(cpu_seconds(lambda: [function(text) for text in sample])[0] for _ in range(2))

    ratio = seconds(theirs) / seconds(duplicates.signature)
    record_figure("times as fast", ratio)
    assert ratio > 5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_clusters_follow_chains(count):
    pairs = [(np.array([2 * i]), np.array([2 * i + 1])) for i in range(count)]
    joined = [*pairs, *((np.array([2 * i + 1]), np.array([2 * i + 2])) for i in range(count - 1))]
    assert duplicates.clusters(2 * count, iter(joined)).tolist() == [0] * (2 * count)


def test_signatures_are_the_same_in_memory_and_in_a_file(monkeypatch):
    sample = texts(40, words=20)
    expected = np.stack([duplicates.signature(text) for text in sample])
    for spill in (duplicates.SPILL, 4096, 1):
        monkeypatch.setattr(duplicates, "SPILL", spill)
        kept = duplicates.Signatures()
        for text in sample:
            kept.add(text)
        np.testing.assert_array_equal(kept.take(), expected)
    assert duplicates.Signatures().take().shape == (0, duplicates.SLOTS)


def test_exact_keys_tell_all_texts_apart_that_differ():
    assert duplicates.exact_hash("a b", "c") == duplicates.exact_hash("a b", "c")
    others = [("a  b", "c"), ("a b ", "c"), ("a b", "c", ""), ("a ", "bc"), ("a b\x1fc",), ("", "a b", "c")]
    assert len({duplicates.exact_hash(*texts) for texts in [("a b", "c"), *others]}) == 1 + len(others)
