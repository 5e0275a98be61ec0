"""A small real tokenizer (byte-level BPE) for the tests of data."""

import pytest
from support import chat_templates


@pytest.fixture(scope="session")
def make_tokenizer():
    return chat_templates.make_tokenizer


@pytest.fixture(scope="session")
def chatml(make_tokenizer):
    return make_tokenizer(chat_templates.CHATML)
