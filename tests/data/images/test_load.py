"""Images from files and rows: sizes without decoding them, pixels as transformers loads them, what is refused."""

import numpy as np
import pytest
from PIL import Image
from support import seeing
from transformers.image_utils import load_image

from ftjax.data.images import load
from ftjax.errors import UserError


def turned(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    seeing.picture(20, 12).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_a_picture_is_upright_as_transformers_loads_it(tmp_path, ending, orientation):
    path = tmp_path / f"a.{ending}"
    turned(path, orientation)
    theirs = load_image(str(path))
    np.testing.assert_array_equal(load.pixels(str(path), "row"), theirs)
    assert load.size(str(path), "row")[:2] == theirs.size


def test_a_png_that_says_after_its_pixels_how_it_is_turned(tmp_path):
    path = tmp_path / "late.png"
    turned(path, 6)
    content = path.read_bytes()
    start = content.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4])
    end = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[stop:end] + content[start:stop] + content[end:])
    assert load.size(str(path), "row")[:2] == load_image(str(path)).size == (12, 20)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_all_pictures_are_rgb(tmp_path, mode):
    path = str(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    picture = seeing.picture(9, 7)
    if mode == "I;16":
        picture = Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000)
    else:
        picture = picture.convert(mode)
    picture.save(path)
    ours = load.pixels(path, "row")
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(ours, load_image(path))


def test_a_picture_may_be_in_the_row_itself(tmp_path):
    data = seeing.as_data(seeing.picture(9, 7))
    np.testing.assert_array_equal(load.pixels(data, "row"), seeing.picture(9, 7))
    assert load.size(data, "row")[:2] == (9, 7)
    np.testing.assert_array_equal(load.pixels(data, "row"), load_image(data))


def test_a_jpeg_is_not_decoded_for_its_size(tmp_path):
    path = tmp_path / "cut.jpg"
    content = seeing.as_bytes(seeing.picture(64, 48), "JPEG")
    path.write_bytes(content[: len(content) // 2])
    assert load.size(str(path), "row") == (64, 48, len(content) // 2)
    with pytest.raises(UserError, match=r"row: .*cut.jpg cannot be read as an image .*damaged"):
        load.pixels(str(path), "row")


def test_names_do_not_depend_on_where_files_lie():
    a, b = (seeing.as_data(seeing.picture(9, 7, seed)) for seed in (0, 1))
    assert load.name_of("/a/./b/c.png") == load.name_of("/d/./b/c.png") == "b/c.png"
    assert load.identity("/a/./b/c.png") == load.identity("/a/b/./c.png") != load.identity("/d/./b/c.png")
    assert load.name_of(a) == load.identity(a) != load.name_of(b)


def test_what_is_no_picture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "page.svg").write_text("<svg/>")
    seeing.picture(30, 30).save(tmp_path / "large.png")
    monkeypatch.setattr(load, "MAX_PIXELS", 800)
    refused = {
        "missing.png": "f:1: there is no image .*missing.png; correct the path",
        "text.png": "text.png cannot be read as an image",
        "page.svg": "page.svg cannot be read as an image",
        "large.png": "large.png has 30 x 30 pixels, more than 800",
        "": "f:1: .* is no file; correct the path",
    }
    for name, message in refused.items():
        with pytest.raises(UserError, match=message):
            load.size(str(tmp_path / name), "f:1")
    for data, message in {
        "data:image/png,abc": "must be in base64",
        "data:image/png;base64,a!": "not base64",
        "data:image/png;base64,": "an image in the row cannot be read",
    }.items():
        with pytest.raises(UserError, match=f"f:1: .*{message}"):
            load.size(data, "f:1")
    monkeypatch.setattr(load, "MAX_BYTES", 100)
    with pytest.raises(UserError, match=r"large\.png has more than 0 MiB"):
        load.size(str(tmp_path / "large.png"), "f:1")
    with pytest.raises(UserError, match="an image has more than 0 MiB"):
        load.size(seeing.as_data(seeing.picture(20, 20)), "f:1")


def test_a_picture_that_is_made_to_fill_the_memory_is_refused(tmp_path, monkeypatch):
    seeing.picture(30, 30).save(tmp_path / "bomb.png")
    for most in (800, 400):  # Pillow warns of the first, and refuses the second itself
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(UserError, match=r"bomb\.png has more than"):
            load.size(str(tmp_path / "bomb.png"), "f:1")
