"""Keys: what is kept of them, and who they let in."""

import sqlite3

import pytest

from ftjax.errors import UserError
from ftjax.hosted.database import connect
from ftjax.hosted.keys import Keys


@pytest.fixture
def keys(tmp_path):
    engine = connect(f"sqlite:///{tmp_path / 'keys.db'}")
    yield Keys(engine)
    engine.dispose()


def test_a_key_holds_until_it_is_revoked(keys):
    anna, ben = keys.create("anna"), keys.create("ben")
    assert len(anna.secret) == 47  # "tml-" and 256 bits
    assert anna.secret.startswith("tml-")
    assert (keys.owner(anna.secret), keys.owner(ben.secret)) == (anna.id, ben.id)
    for wrong in ("", "tml-", anna.secret[:-1], anna.secret + "x", anna.secret.lower(), "ü", "\0"):
        assert keys.owner(wrong) is None
    keys.revoke(anna.id)
    keys.revoke(anna.id)
    assert (keys.owner(anna.secret), keys.owner(ben.secret)) == (None, ben.id)
    shown = [(key.id, key.name, key.prefix, bool(key.revoked_at)) for key in keys.all()]
    assert shown == [(anna.id, "anna", anna.secret[:8], True), (ben.id, "ben", ben.secret[:8], False)]


def test_a_renewed_key_is_the_same_owner(keys):
    anna = keys.create("anna")
    keys.revoke(anna.id)
    renewed = keys.renew(anna.id)
    assert (keys.owner(anna.secret), keys.owner(renewed.secret)) == (None, anna.id)
    assert keys.all()[0].prefix == renewed.secret[:8]


def test_the_database_does_not_have_the_key(keys, tmp_path):
    secret = keys.create("anna").secret
    with sqlite3.connect(tmp_path / "keys.db") as database:
        dump = "\n".join(database.iterdump())
    database.close()
    assert "anna" in dump
    assert secret[9:20] not in dump


def test_mistakes_are_said(keys):
    with pytest.raises(UserError, match="there is no key key_x; `keys list` shows their ids"):
        keys.revoke("key_x")
    for name in ("", " ", "a\nb"):
        with pytest.raises(UserError, match="give it a name"):
            keys.create(name)
