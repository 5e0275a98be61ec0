"""What looks like personal data is found, what only resembles it is not, and nothing is shown whole."""

import pytest

from ftjax.data.audit import private

THERE = {
    "email": ["write to anna.k@firma.de please", "x <bob+lists@mail.corp.io>", "a@b.cc"],
    "phone": ["call +49 30 1234 5678 now", "(555) 123-4567", "555-123-4567", "+1 (415) 555-2671", "+442079460958"],
    "card": ["4111 1111 1111 1111", "card 5500-0000-0000-0004.", "378282246310005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "IBAN GB82WEST12345698765432"],
    "ip": ["from 8.8.8.8 to", "host 93.184.216.34."],
    "ssn": ["his SSN is 536-22-1234"],
    "key": ["sk-" + "a1B2" * 6, "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a" * 36, "-----BEGIN RSA PRIVATE KEY-----"],
}
NOT_THERE = [
    "a@b", "see @anna or user@example.com or x@host.test", "the 4111 1111 1111 1112 variant", "1111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 01", "127.0.0.1 and 192.168.0.1 and 10.0.0.3", "version 1.2.3.4.5 and 999.1.2.3",
    "order 12345, 3.14159265358979", "in 1999-2004 and 2026-11-22", "000-12-3456", "sk-short", "0.000001234567",
    "GDP rose 2,345,678,901 dollars", "12:30:45.123456", "",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, all_ in THERE.items() for text in all_])
def test_private_strings_are_found_where_they_are_and_masked(kind, text):
    surrounded = "Some words before.\n" + text + "\nand some after, 12 of them."
    found = list(private.matches(surrounded))
    assert [one for one, _, _ in found] == [kind]
    _, place, hidden = found[0]
    assert surrounded[place : place + 2] == hidden[:2]
    secret = max(text.split(), key=len)
    assert secret not in hidden
    assert "***" in hidden


@pytest.mark.parametrize("text", NOT_THERE)
def test_what_only_looks_alike_is_left_alone(text):
    assert list(private.matches(text)) == []


def test_many_in_one_text_are_all_found():
    text = "\n".join(one for all_ in THERE.values() for one in all_)
    kinds = [kind for kind, _, _ in private.matches(text)]
    assert {kind: kinds.count(kind) for kind in THERE} == {kind: len(all_) for kind, all_ in THERE.items()}


@pytest.mark.parametrize(
    "text",
    ["caf\ufffd", "cafÃ©", "donâ€™t", "don’t".encode().decode("cp1252"), "é".encode().decode("latin-1"), "a\x00b"],
)
def test_garbled_text_is_seen(text):
    assert list(private.garbled(text))


@pytest.mark.parametrize("text", ["café", "don’t", "Ãgypten", "日本 🙂", "tab\tand\r\nline", "São", "â la carte"])
def test_proper_text_is_not_garbled(text):
    assert list(private.garbled(text)) == []
