"""A small real tokenizer (byte-level BPE) for the tests of inspection."""

import pytest
from support import chat_templates


@pytest.fixture(scope="session")
def make_tokenizer():
    return chat_templates.make_tokenizer
