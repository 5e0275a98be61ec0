"""Strings that look like personal data or secrets, and text that was decoded wrongly.

Numbers with a checksum are verified (cards by Luhn, IBANs by ISO 7064 mod 97); addresses that belong to nobody are left
out (RFC 2606's example domains, private and reserved IP ranges). No match is ever shown whole.
"""

import ipaddress
import re
from collections.abc import Iterator

# name -> what its matches are, in words
PATTERNS = {
    "email": "e-mail addresses",
    "phone": "telephone numbers",
    "card": "payment card numbers",
    "iban": "bank accounts (IBAN)",
    "ip": "public IP addresses",
    "ssn": "US social security numbers",
    "key": "API keys or private keys",
}
# Where one of the numbers below can be: seven or more digits and their separators. Most texts have none, and this one
# search is much quicker than five.
_NUMBER = re.compile(r"\d[\d .()/-]{5,}\d")
_MARGIN = 40  # characters around the digits that may belong to the number: a "+", an IBAN's letters
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,}")  # starts with a literal, which makes the search quick
_LOCAL = re.compile(r"[A-Za-z0-9._%+-]+$")
_NOBODYS = re.compile(r"@(?:[\w.-]+\.)?(?:example\.(?:com|org|net)|[\w.-]+\.(?:example|test|invalid|localhost))$", re.I)
_CARD = re.compile(  # in one piece, in fours, or as American Express writes them
    r"(?<![\w.-])[3-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){3}(?:[ -]\d{3})?|\d{3}[ -]\d{6}[ -]\d{5})(?![ -]?\w)"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_IP = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){1,4}"  # +49 30 1234 567
    r"|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?![\w-])"  # (555) 123-4567, 555-123-4567
)
_KEY_STARTS = (
    "sk-", "AKIA", "ghp_", "gho_", "ghs_", "github_pat_", "xoxb-", "xoxp-", "AIza", "hf_", "glpat-", "eyJ",
    "PRIVATE KEY",
)  # fmt: skip
_KEY = re.compile(
    r"(?<![\w-])(?:sk-[\w-]{20,}|AKIA[0-9A-Z]{16}|gh[pos]_[A-Za-z0-9]{36,}|github_pat_\w{40,}|xox[bp]-[\w-]{20,}"
    r"|AIza[\w-]{35}|hf_[A-Za-z]{30,}|glpat-[\w-]{20,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----)"
)
# UTF-8 read as Latin-1 or Windows-1252: "Ã©" for "é", "â€™" for an apostrophe; and what no decoder could read.
_GARBLED = re.compile(
    "\ufffd|ï¿½|Ã[\u0080-\u00bf\u0192\u0160\u0161\u201a-\u2122]|â€[\u0080-\u00bf\u0153\u2013-\u2122]|Â[\u00a0-\u00bf]"
)
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")  # tab, line breaks and the terminal's escape are common


def matches(text: str) -> Iterator[tuple[str, int, str]]:
    """(key of PATTERNS, offset in the text, the string masked) of each string that looks private."""
    if "@" in text:
        for domain in _DOMAIN.finditer(text):
            local = _LOCAL.search(text, max(0, domain.start() - 64), domain.start())
            if local and not _NOBODYS.search(domain.group()):
                yield "email", local.start(), masked(local.group() + domain.group())
    if any(start in text for start in _KEY_STARTS):
        for match in _KEY.finditer(text):
            yield "key", match.start(), masked(match.group())
    for start, stop in _around_numbers(text):
        yield from _numbers(text[start:stop], start)


def _around_numbers(text: str) -> Iterator[tuple[int, int]]:
    """The stretches of text that hold the numbers, with a margin, not overlapping."""
    start = stop = -1
    for match in _NUMBER.finditer(text):
        if start >= 0 and match.start() - _MARGIN > stop:
            yield start, stop
            start = -1
        start = max(0, match.start() - _MARGIN) if start < 0 else start
        stop = match.end() + _MARGIN
    if start >= 0:
        yield start, stop


def _numbers(text: str, offset: int) -> Iterator[tuple[str, int, str]]:
    taken: list[tuple[int, int]] = []
    for name, pattern, is_valid in _NUMBERS:
        for match in pattern.finditer(text):
            apart = all(match.end() <= start or stop <= match.start() for start, stop in taken)
            if apart and is_valid(match.group()):
                taken.append(match.span())
                yield name, offset + match.start(), masked(match.group())


def masked(secret: str) -> str:
    """Its first two characters and its length: enough to find it in its row, not to use it."""
    return f"{secret[:2]}*** {len(secret)} characters"


def garbled(text: str) -> Iterator[int]:
    """Offsets of replacement or control characters, and of UTF-8 that was read as another encoding."""
    if not text.isascii():
        for match in _GARBLED.finditer(text):
            yield match.start()
    for match in _CONTROL.finditer(text):
        yield match.start()


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:  # 999.1.2.3, or a version number with a leading zero
        return False


def _is_phone(text: str) -> bool:
    return 8 <= sum(char.isdigit() for char in text) <= 15


def _is_card(text: str) -> bool:
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    plain = text.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1


# (key of PATTERNS, pattern, check of a match), the strictest first: what one has matched, no later one may overlap.
_NUMBERS = (
    ("iban", _IBAN, _is_iban),
    ("card", _CARD, _is_card),
    ("ip", _IP, _is_public),
    ("ssn", _SSN, bool),
    ("phone", _PHONE, _is_phone),
)
