"""Picture files, opened as transformers' `load_image` opens them, which the serving engines use; and why one cannot be used."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import PIL
from PIL import Image, ImageOps, UnidentifiedImageError

from glmq.checkpoint.disk import LFS_POINTER, LFS_START
from glmq.machine import available_memory, is_out_of_memory
from glmq.model.family import Family

IMAGE_SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_PIXELS: Final = 178_956_970
"""Pictures with more are taken for an attack on the memory by Pillow, and so by the serving engines."""
BYTES_PER_PIXEL: Final = 8
"""While a picture is turned upright and brought into RGB."""
THUMBNAIL: Final = 160
NO_FILE: Final = "no such file"
_DEEP_MODES: Final = frozenset({"I;16", "I;16B", "I;16L", "I;16N", "I", "F"})
_HEAD: Final = 1024
"""Bytes by which a file is recognised."""

_RAW_SUFFIXES: Final = (".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".srw")
"""Raw files of cameras, of which Pillow reads the thumbnail at most."""
_RAW: Final = "is a camera's raw file, which Pillow does not read; convert it to JPEG"

_MAGIC: Final = (
    (LFS_START, LFS_POINTER),
    (b"%PDF", "is a PDF document; save its pages as pictures"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\x1f\x8b", "is a gzip archive; unpack it"),
    (b"Rar!", "is a rar archive; unpack it"),
    (b"7z\xbc\xaf", "is a 7z archive; unpack it"),
    (b"\x1aE\xdf\xa3", "is a video; take pictures out of it"),
    (b"\xff\x0a", "is a JPEG XL picture, which Pillow does not read; convert it to JPEG or PNG"),
    (b"\0\0\0\x0cJXL ", "is a JPEG XL picture, which Pillow does not read; convert it to JPEG or PNG"),
    (b"FUJIFILMCCD-RAW", _RAW),
)
_DRAWING: Final = "is a drawing, which has no pixels, and which another program would have to draw; convert it to PNG"
_DATA: Final = "holds data, of which Pillow makes no picture; convert it to PNG"
_DRAWINGS: Final = {"EPS": _DRAWING, "WMF": _DRAWING, "BUFR": _DATA, "GRIB": _DATA, "HDF5": _DATA}
"""What Pillow opens, but does not decode itself."""
_PICTURES: Final = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
"""How pictures begin that Pillow does read, where they are whole."""
_HEIC_BRANDS: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True, slots=True)
class InlinePicture:
    """A picture that lies within a line of a samples file."""

    data: bytes = field(repr=False)
    """The bytes of a picture file."""


PictureFile: TypeAlias = Path | InlinePicture


@dataclass(frozen=True, slots=True)
class PictureRules:
    """Which pictures can be used, beside that they decode."""

    family: Family | None = None
    """Of models: says which sides its image processor takes; None: they are not looked at."""
    shrinks: bool = False
    """Pictures are shrunk before use, so that any number of pixels is read, as long as the memory holds them."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What a look at a picture file found."""

    defect: str | None
    """Why it cannot be used, or None."""
    is_deep: bool = False
    """It has more than 8 bits a channel, of which transformers cuts off what is above 255."""


def load_picture(file: PictureFile) -> Image.Image:
    """The decoded picture in RGB, upright: the pixels of transformers' `load_image`. Of an animation the first frame."""
    with _opened(file) as image:
        return _upright(image)


def thumbnail(image: Image.Image) -> bytes:
    """A picture of at most THUMBNAIL pixels a side, for a page: the bytes of a JPEG file."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return data.getvalue()


def examine_picture(file: PictureFile, rules: PictureRules) -> Examined:
    """Decode a picture, and say why it cannot be used if that is so."""
    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():
            return Examined("no regular file")  # opening a pipe would wait for somebody to write into it
        if isinstance(file, Path) and file.suffix.lower() in _RAW_SUFFIXES:
            return Examined(_RAW)
        with _opened(file) as image:
            defect = _DRAWINGS.get(image.format or "") or _size_defect(image.width, image.height, rules)
            if defect is None:
                _upright(image)
            return Examined(defect, is_deep=image.mode in _DEEP_MODES)
    except Exception as error:  # Pillow's decoders raise whatever a broken file trips over
        if is_out_of_memory(error):
            raise
        return Examined(_reason(file, error))


@contextmanager
def _opened(file: PictureFile) -> Iterator[Image.Image]:
    """Without Pillow's limit on pixels, in whose place `_size_defect` looks at the header, and without its warnings."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file if isinstance(file, Path) else io.BytesIO(file.data)) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _upright(image: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)
    rgb: Image.Image = image.convert("RGB")
    return rgb


def _size_defect(width: int, height: int, rules: PictureRules) -> str | None:
    """Why a picture of this many pixels, by its header, is not decoded at all; or None."""
    defect = None if rules.family is None else rules.family.picture_defect(width, height)
    pixels = width * height
    if defect is not None or pixels <= MOST_PIXELS:
        return defect
    if not rules.shrinks:
        return (
            f"has {width} x {height} pixels, more than the {MOST_PIXELS} that are read; shrink it, "
            "or pass --max-pixels, with which it is shrunk here"
        )
    wanted, available = pixels * BYTES_PER_PIXEL, available_memory()
    if wanted > available:
        return (
            f"has {width} x {height} pixels, which take {wanted / 2**30:.1f} GiB of memory to read, "
            f"{available / 2**30:.1f} are available; shrink it"
        )
    return None


def _reason(file: PictureFile, error: Exception) -> str:
    """Why a file that could not be opened or decoded is no usable picture."""
    match error:
        case FileNotFoundError():
            return "a link to a file that is not there" if isinstance(file, Path) and file.is_symlink() else NO_FILE
        case PermissionError():
            return "no permission to read it"
        case OSError(errno=int(), strerror=str(what)):
            return f"cannot be read: {what}"
        case UnidentifiedImageError():
            return _recognised(_head(file)) or f"is no picture that Pillow {PIL.__version__} reads"
    text = f"{error}".partition("\n")[0]
    if "truncated" in text.lower() or "unexpected end" in text.lower():
        return "is cut off, its end is missing; copy or download it again"
    if "MAX_TEXT" in text or text == "Decompressed Data Too Large":  # the second up to Pillow 10
        return "carries a text of more than 1 MiB beside its pixels, which Pillow does not read; save it without"
    return f"is damaged ({type(error).__name__}: {text:.100})"


def _head(file: PictureFile) -> bytes:
    if isinstance(file, InlinePicture):
        return file.data[:_HEAD]
    with file.open("rb") as opened:
        return opened.read(_HEAD)


def _recognised(head: bytes) -> str | None:
    """What a file is, by its first bytes, that is no picture for Pillow."""
    if not head.strip():
        return "is empty"
    if not head.strip(b"\0"):
        return "holds only zeros, as an interrupted copy leaves it; copy it again"
    if head[4:8] == b"ftyp":
        return _recognised_box(head[8:12], head[16:64])
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "is a video; take pictures out of it"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head.startswith(_PICTURES):
        return "begins like a picture, but is damaged or cut off; copy or download it again"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, perhaps what a failed download left; download it again"
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "is an SVG drawing, which has no pixels; convert it to PNG"
    if text.startswith((b"{", b"[", b"<?xml")):
        return "is text (JSON or XML), perhaps what a failed download left; download it again"
    return None


def _recognised_box(brand: bytes, compatible: bytes) -> str:
    """The same for files that are boxes within each other: HEIC, AVIF, MP4."""
    if brand in (b"avif", b"avis") or b"avif" in compatible:
        return f"is an AVIF picture, which this Pillow ({PIL.__version__}) does not read; convert it to JPEG or PNG"
    if brand in _HEIC_BRANDS:
        return "is a HEIC picture, as phones make them, which Pillow does not read; convert it to JPEG"
    if brand == b"crx ":
        return _RAW
    return "is a video; take pictures out of it"
