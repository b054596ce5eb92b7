"""Read one image file as RGB pixels: formats, colour modes and orientation (docs/data.md). Does not import torch."""

import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "AVIF")
"""Pillow's names of the formats that are opened, whatever a file's name says. The common ones come first."""

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff",
    ".avif",
)  # fmt: skip
"""The names of image files end with one of these, in any case."""

BACKGROUND = (255, 255, 255)
"""The colour behind transparent pixels."""

LARGE_PIXELS = 2**20
"""A JPEG file of more pixels is decoded at a half, a quarter or an eighth of its size, if it will be shrunk anyway."""

HUGE_PIXELS = 2**25
"""Of images with more pixels, one at a time is decoded: each may need half a gigabyte or more."""

ORIENTATION_TAG = 0x0112

_huge = threading.Lock()

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what shows the image upright."""

Images = NDArray[np.uint8]


def read(path: Path, size: tuple[int, int], *, upright: bool) -> Images:
    """The pixels of an image file, squashed to `size` (width, height), as (height, width, 3) uint8.

    `upright`: apply the EXIF orientation. A damaged file may raise any Exception: Pillow's decoders do.
    """
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > LARGE_PIXELS:
            image.draft(None, (2 * max(size), 2 * max(size)))  # a no-op for all formats but JPEG
        with _memory(image):
            image.load()
            pixels = _rgb(image)
            turn = TRANSPOSES.get(_orientation(image)) if upright else None
            if turn is not None:
                pixels = pixels.transpose(turn)
            if pixels.size != size:
                pixels = pixels.resize(size, Image.Resampling.BILINEAR)
            return np.asarray(pixels)


def inspect(file: IO[bytes], content: bytes, *, upright: bool) -> tuple[tuple[int, int], list[str]]:
    """Size (width, height) of an image as it is shown, and which rules decide its pixels beyond plain decoding:
    `orientation`, `transparency`, `depth`. Raises what Pillow raises."""
    with Image.open(file, formats=FORMATS) as image:
        size, rules = image.size, []
        # Pillow decodes a whole PNG file in search of metadata behind the pixels.
        has_metadata = image.format != "PNG" or any(key in content for key in (b"eXIf", b"Raw profile", b"rientation"))
        orientation = _orientation(image) if upright and has_metadata else 1
        if orientation in TRANSPOSES:
            rules.append("orientation")
            size = size[::-1] if orientation >= 5 else size
        if _is_deep(image):
            rules.append("depth")
        elif image.has_transparency_data:
            with _memory(image):
                if image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
                    rules.append("transparency")
    return size, rules


def reason(error: Exception) -> str:
    """Why an image can't be read, in a few words without its path."""
    if isinstance(error, UnidentifiedImageError):
        return f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__  # strerror: without the path
    return " ".join(str(text).split())[:120]


def _memory(image: Image.Image) -> AbstractContextManager[Any]:
    """Hold this while an image is decoded: huge ones wait for each other."""
    return _huge if image.width * image.height > HUGE_PIXELS else nullcontext()


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8; 1 if there is none. Pillow turns TIFF files itself."""
    try:
        orientation = 1 if image.format == "TIFF" else image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata of a sound image
        return 1
    return orientation if orientation in TRANSPOSES else 1


def _is_deep(image: Image.Image) -> bool:
    """Whether the image is grey with 16 bits a pixel. Pillow scales PGM files of more than 8 bits to 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode. Raises ValueError for 32-bit pixels, whose range is not known."""
    if _is_deep(image):
        bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
        highest = 2**bits - 1
        values = np.asarray(image).astype(np.uint32).clip(0, highest)
        if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # type: ignore[attr-defined]  # 0 is white
            values = highest - values
        return Image.fromarray(((values * 255 + highest // 2) // highest).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        kind = {"I": "32-bit or signed integers", "F": "floating-point numbers"}[image.mode]
        raise ValueError(f"its pixels are {kind}, whose range is not known: save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    foreground = image.convert("RGBA")
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(foreground, mask=foreground)
    return flat
