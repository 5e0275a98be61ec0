"""What keeps a text from doing more than being read, on a page or in a terminal."""

import base64
import hashlib
import re

# Controls, lone surrogates, and what changes the direction of the text after it.
_UNSEEN = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def spelled(text: str) -> str:
    """The text with characters that would turn what is around them, or command a terminal, spelled as [U+001B]."""
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def digest(text: str) -> str:
    """By which a content security policy knows a page's own script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
