"""A small real tokenizer (byte-level BPE) for the tests of inspection."""

import chat_templates
import pytest


@pytest.fixture(scope="session")
def make_tokenizer():
    return chat_templates.make_tokenizer
