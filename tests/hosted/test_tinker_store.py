"""Checkpoints of Tinker's client on the disk: names, bounds, owners, expiry, and what a crash leaves."""

import pytest

from ftjax.hosted.database import connect
from ftjax.hosted.refusals import Refused
from ftjax.hosted.tinker import store as stores
from ftjax.hosted.tinker.checkpoints import size_of
from ftjax.hosted.tinker.store import SAMPLER, WEIGHTS, Store


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def write(size=100):
    def to(path):
        path.mkdir()
        (path / "file").write_bytes(b"x" * size)

    return to


@pytest.fixture
def made(tmp_path):
    """(store, run, clock)"""
    clock, engine = Clock(), connect(f"sqlite:///{tmp_path / 'server.db'}")
    store = Store(engine, tmp_path / "checkpoints", 250, clock)
    store.begin("s:train:0", "anna", "s", "base", {"rank": 4}, None)
    yield store, store.run("s:train:0", "anna"), clock
    engine.dispose()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "x",
        "tinker://a/weights",
        "tinker://a/weights/b/c",
        "tinker://a/other/b",
        "/etc/passwd",
        "tinker:///weights/",
    ],
)
def test_paths_that_are_none(made, path):
    with pytest.raises(Refused):
        made[0].find(path, "anna")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "-a", "x" * 200, "ä"])
def test_names_that_are_none(made, name):
    with pytest.raises(Refused, match="no name of a checkpoint"):
        made[0].save(made[1], WEIGHTS, name, write(), size_of)


def test_a_checkpoint_from_its_save_to_its_end(made):
    store, run, clock = made
    saved = store.save(run, WEIGHTS, "first", write(), size_of, ttl=3600, metadata={"a": "b"})
    assert saved.path == "tinker://s:train:0/weights/first"
    found = store.find(saved.path, "anna")
    assert (store.directory(found) / "file").read_bytes() == b"x" * 100
    assert "first" not in str(store.directory(found))
    with pytest.raises(Refused, match="there is no checkpoint"):
        store.find(saved.path, "bertha")
    with pytest.raises(Refused, match="use another name"):
        store.save(run, WEIGHTS, "first", write(), size_of)
    replaced = store.save(run, WEIGHTS, "first", write(120), size_of, ttl=3600, overwrite=True)
    assert store.directory(replaced) != store.directory(saved)
    assert not store.directory(saved).exists()
    store.save(run, SAMPLER, "first", write(), size_of)
    assert [its.kind for its in store.checkpoints("anna")[0]] == [SAMPLER, WEIGHTS]
    clock.now += 3601
    with pytest.raises(Refused, match="there is no checkpoint"):
        store.find(replaced.path, "anna")
    store.expire()
    assert not store.directory(replaced).exists()
    assert store.checkpoints("anna", "s:train:0")[1] == 1


def test_a_key_has_its_quota(made):
    store, run, _ = made
    for name in ("a", "b", "c"):
        store.save(run, WEIGHTS, name, write(), size_of)
    with pytest.raises(Refused, match="your checkpoints have 300 bytes of 250"):
        store.save(run, WEIGHTS, "d", write(), size_of)
    store.delete(store.find("tinker://s:train:0/weights/a", "anna"))
    store.save(run, WEIGHTS, "d", write(), size_of)


@pytest.mark.parametrize("seconds", [0, 3599, 10**10, -1])
def test_times_that_are_none(made, seconds):
    with pytest.raises(Refused, match="ttl_seconds"):
        made[0].save(made[1], WEIGHTS, "a", write(), size_of, ttl=seconds)


def test_what_a_client_says_of_its_things_is_kept_up_to_a_bound(made):
    store, run, _ = made
    large = {"notes": "x" * 2**14}
    for keep in (
        lambda: store.open("t", "anna", None, large),
        lambda: store.begin("t:train:0", "anna", "t", "base", {"rank": 4}, large),
        lambda: store.save(run, WEIGHTS, "a", write(), size_of, metadata=large),
    ):
        with pytest.raises(Refused, match="user_metadata has 16,397 characters as JSON") as refused:
            keep()
        assert refused.value.param == "user_metadata"
    assert store.sessions("anna", 10, 0) == []
    assert store.checkpoints("anna")[1] == 0


def test_what_a_killed_server_had_not_finished_goes(made, tmp_path):
    store, run, clock = made
    saved = store.save(run, WEIGHTS, "a", write(), size_of)
    write()(store.new_directory())
    with pytest.raises(OSError, match="full"):
        store.save(run, WEIGHTS, "b", failing, size_of)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    again = Store(store._engine, tmp_path / "checkpoints", 250, clock)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [again.directory(saved).name]


def failing(path):
    write()(path)
    raise OSError("full")


def test_kinds_are_those_of_the_client():
    assert stores.KINDS == {"weights": "training", "sampler_weights": "sampler"}
