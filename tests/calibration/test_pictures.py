import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from transformers.image_utils import load_image

from glmq.calibration import pictures
from glmq.calibration.pictures import InlinePicture, PictureRules, examine_picture, load_picture
from glmq.checkpoint.disk import LFS_POINTER
from glmq.model.config import FAMILY

Y, X = np.mgrid[0:40, 0:60]
RGB = Image.fromarray(np.stack([X * 4, Y * 6, (X * Y) % 256], -1).astype(np.uint8))
TAKES = PictureRules(FAMILY)
DOWNLOAD = "is text (JSON or XML), perhaps what a failed download left; download it again"
DRAWING = "is a drawing, which has no pixels, and which another program would have to draw; convert it to PNG"
NOT_READ = f"is no picture that Pillow {PIL.__version__} reads"


def rotated(orientation: int, name: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(RGB, name, exif=exif)


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def with_transparency(name: str, value: object) -> bytes:
    return encoded(RGB.quantize(16), name, transparency=value)


def animated(name: str) -> bytes:
    return encoded(RGB, name, save_all=True, append_images=[RGB.rotate(180)], duration=50)


def png(depth: int, colour: int, row_bytes: int) -> bytes:
    """A PNG that Pillow itself does not write: one row of rising bytes, twice."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    width = row_bytes * 8 // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour])
    raw = (b"\0" + bytes(range(1, row_bytes + 1))) * 2
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 2, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


LA = Image.merge("LA", (RGB.convert("L"), RGB.convert("L").rotate(180)))
RGBA = Image.merge("RGBA", (*RGB.split(), RGB.convert("L")))
PICTURES = {
    **{f"exif {turn} jpeg": rotated(turn, "JPEG") for turn in range(1, 9)},
    "exif 9 jpeg": rotated(9, "JPEG"),
    "exif 6 png": rotated(6, "PNG"),
    "exif 8 webp": rotated(8, "WEBP"),
    "exif 3 tiff": rotated(3, "TIFF"),
    "cmyk jpeg": encoded(RGB.convert("CMYK"), "JPEG"),
    "cmyk tiff": encoded(RGB.convert("CMYK"), "TIFF"),
    "ycbcr tiff": encoded(RGB.convert("YCbCr"), "TIFF"),
    "palette png, one transparent": with_transparency("PNG", 3),
    "palette png, each its transparency": with_transparency("PNG", bytes(range(0, 160, 10))),
    "palette gif, one transparent": with_transparency("GIF", 3),
    "la png": encoded(LA, "PNG"),
    "la tiff": encoded(LA, "TIFF"),
    "rgba png": encoded(RGBA, "PNG"),
    "rgba webp": encoded(RGBA, "WEBP"),
    "1 bit png": encoded(RGB.convert("1"), "PNG"),
    "2 bit png": png(2, 0, 8),
    "16 bit gray png": encoded(Image.fromarray((X * 1000).astype(np.uint16)), "PNG"),
    "16 bit rgb png": png(16, 2, 36),
    "16 bit rgba png": png(16, 6, 48),
    "16 bit gray and alpha png": png(16, 4, 16),
    "16 bit gray tiff": encoded(Image.fromarray((X * 1000).astype(np.uint16)), "TIFF"),
    "32 bit tiff": encoded(Image.fromarray((X * 300).astype(np.int32)), "TIFF"),
    "float tiff": encoded(Image.fromarray((X / 60).astype(np.float32)), "TIFF"),
    "float tiff beyond 255": encoded(Image.fromarray((X * 9.5 - 100).astype(np.float32)), "TIFF"),
    "animated gif": animated("GIF"),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "tiff of pages": animated("TIFF"),
    "two views of a phone": animated("MPO"),
    "progressive jpeg": encoded(RGB, "JPEG", progressive=True),
    "bmp": encoded(RGB, "BMP"),
}
DEEP = {
    "16 bit gray png",
    "16 bit gray tiff",
    "32 bit tiff",
    "float tiff",
    "float tiff beyond 255",
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_has_the_pixels_that_the_engines_see(kind: str) -> None:
    data = PICTURES[kind]
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
        warnings.simplefilter("ignore")
        try:
            wanted = load_image(image)
        except OSError as error:
            pytest.skip(f"Pillow {PIL.__version__} does not read it: {error}")
    found = load_picture(InlinePicture(data))
    assert (found.mode, found.size) == ("RGB", wanted.size)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    examined = examine_picture(InlinePicture(data), PictureRules())
    assert (examined.defect, examined.is_deep) == (None, kind in DEEP)


def test_a_photograph_of_a_phone_stands_upright() -> None:
    assert load_picture(InlinePicture(PICTURES["exif 6 jpeg"])).size == (40, 60)


def ftyp(brand: bytes, *compatible: bytes) -> bytes:
    return struct.pack(">I", 16 + 4 * len(compatible)) + b"ftyp" + brand + b"\0\0\0\0" + b"".join(compatible)


def is_opened(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).close()
    except UnidentifiedImageError:
        return False
    return True


BROKEN = "begins like a picture, but is damaged or cut off; copy or download it again"
JPEG = encoded(RGB, "JPEG")
HALF = JPEG[: len(JPEG) // 2]  # within its tables, which some versions of Pillow read at once
PNG = encoded(RGB, "PNG")
BIG_TEXT = PngImagePlugin.PngInfo()
BIG_TEXT.add_text("workflow", "z" * 2_000_000, zip=True)
HEIC = "is a HEIC picture, as phones make them, which Pillow does not read; convert it to JPEG"
VIDEO = "is a video; take pictures out of it"
RAW = "is a camera's raw file, which Pillow does not read; convert it to JPEG"
CUT = "is cut off, its end is missing; copy or download it again"
JXL = "is a JPEG XL picture, which Pillow does not read; convert it to JPEG or PNG"
SVG = "is an SVG drawing, which has no pixels; convert it to PNG"
PAGE = "is an HTML page, perhaps what a failed download left; download it again"
TEXT = "carries a text of more than 1 MiB beside its pixels, which Pillow does not read; save it without"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"\r\n", "is empty"),
        (bytes(5000), "holds only zeros, as an interrupted copy leaves it; copy it again"),
        (JPEG[:-200], CUT),
        (JPEG[:-2], CUT),
        (HALF, "is damaged (OSError: cannot load this image)" if is_opened(HALF) else BROKEN),
        (PNG[: len(PNG) // 2], CUT),
        (encoded(RGB, "BMP")[:500], CUT),
        (encoded(RGB, "TIFF")[:500], CUT),
        (encoded(RGB, "WEBP")[:200], "is damaged (OSError: could not create decoder object)"),
        (PNG[:60] + bytes(20) + PNG[80:], "is damaged (OSError: broken data stream when reading image file)"),
        (PNG[:40], BROKEN),
        (JPEG[:4], BROKEN),
        (PICTURES["animated gif"][:300], BROKEN),
        (encoded(RGB, "PNG", pnginfo=BIG_TEXT), TEXT),
        (ftyp(b"heic", b"mif1", b"heic"), HEIC),
        (ftyp(b"mif1", b"mif1", b"heic"), HEIC),
        (ftyp(b"crx ", b"crx ", b"isom"), RAW),
        (b"FUJIFILMCCD-RAW 0201FF", RAW),
        (ftyp(b"isom", b"isom", b"mp41"), VIDEO),
        (ftyp(b"qt  "), VIDEO),
        (b"\x1aE\xdf\xa3\x01\0\0\0", VIDEO),
        (b"RIFF\0\0\0\0AVI LIST", VIDEO),
        (b"\xff\x0a\xfa\x1f", JXL),
        (b"\0\0\0\x0cJXL \r\n\x87\n", JXL),
        (b"%PDF-1.7\n", "is a PDF document; save its pages as pictures"),
        (b"PK\x03\x04\x14\0", "is a zip archive; unpack it"),
        (b"\x1f\x8b\x08\0", "is a gzip archive; unpack it"),
        (b"Rar!\x1a\x07", "is a rar archive; unpack it"),
        (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\n", LFS_POINTER),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', SVG),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', SVG),
        (b"\xef\xbb\xbf\n<!DOCTYPE html><html>404", PAGE),
        (b'{"error": "not found"}', DOWNLOAD),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', DOWNLOAD),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n", DRAWING),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "holds data, of which Pillow makes no picture; convert it to PNG"),
        (b"\x93NUMPY\x01\0", NOT_READ),
    ],
)  # fmt: skip
def test_the_real_reason_is_named(data: bytes, why: str) -> None:
    assert examine_picture(InlinePicture(data), TAKES).defect == why


@pytest.mark.parametrize(
    ("size", "why"),
    [
        ((28, 28), None),
        ((5600, 28), None),
        ((1, 1), "has 1 x 1 pixels"),
        ((16, 16), "has 16 x 16 pixels"),
        ((27, 300), "has 27 x 300 pixels"),
        ((20000, 50), "has 20000 x 50 pixels"),
        ((28, 5601), "has 28 x 5601 pixels"),
    ],
)
def test_sides_that_the_model_does_not_take_are_found_before_the_run(size: tuple[int, int], why: str | None) -> None:
    picture = InlinePicture(encoded(Image.new("L", size), "PNG"))
    limits = "; the model needs sides of at least 28 pixels and an aspect ratio of at most 200"
    assert examine_picture(picture, TAKES).defect == (None if why is None else why + limits)


def test_a_huge_picture_is_read_where_it_will_be_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", 2399)
    before = Image.MAX_IMAGE_PIXELS
    picture = InlinePicture(JPEG)
    assert examine_picture(picture, TAKES).defect == (
        "has 60 x 40 pixels, more than the 2399 that are read; shrink it, or pass --max-pixels, with which it is shrunk here"
    )
    assert examine_picture(picture, PictureRules(FAMILY, shrinks=True)).defect is None
    monkeypatch.setattr(pictures, "available_memory", lambda: 2400 * 8 - 1)
    assert examine_picture(picture, PictureRules(FAMILY, shrinks=True)).defect == (
        "has 60 x 40 pixels, which take 0.0 GiB of memory to read, 0.0 are available; shrink it"
    )
    assert before == Image.MAX_IMAGE_PIXELS


def test_pillows_own_limit_on_pixels_is_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert examine_picture(InlinePicture(JPEG), TAKES).defect is None
    assert load_picture(InlinePicture(JPEG)).size == (60, 40)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_disk_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    assert examine_picture(tmp_path / "a.png", TAKES).defect == "cannot be read: Input/output error"


def test_a_name_that_no_file_can_have_is_named(tmp_path: Path) -> None:
    assert examine_picture(tmp_path / ("x" * 300), TAKES).defect == "cannot be read: File name too long"
    assert examine_picture(tmp_path / "a\0b", TAKES).defect == "is damaged (ValueError: embedded null byte)"
