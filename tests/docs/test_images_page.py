"""The page on images: its row is one, and its figures are those of the code."""

import json
import re
from pathlib import Path

from ftjax.data.format.formats import check_row
from ftjax.data.format.images import images_of
from ftjax.data.images import load
from ftjax.data.images.rules import rules_of

PAGE = (Path(__file__).parent.parent.parent / "docs/images.md").read_text()


def test_the_row_of_the_page_has_an_image():
    row = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    assert images_of(check_row(row, "page").fields) == ["photos/lamp.jpg"]


def test_limits_and_tokens_are_those_of_the_code():
    assert f"{load.MAX_BYTES >> 20} MiB and {load.MAX_PIXELS // 10**6} million pixels" in PAGE
    assert "JPEG, PNG, WebP, GIF (the first frame), BMP or TIFF" in PAGE
    assert set(load.FORMATS) == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"}
    qwen = rules_of("qwen2_5_vl", {}, {"min_pixels": 3136, "max_pixels": 12845056})
    assert f"640 x 480 has {qwen.tokens(640, 480)}" in PAGE
    gemma = rules_of("gemma3", {}, {})
    assert f"all {gemma.size} x {gemma.size} | {gemma.tokens(640, 480)} |" in PAGE
