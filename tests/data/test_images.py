"""One image file as RGB pixels: every mode, every format, and whatever damage."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from pipeline.data import images

RED = (200, 30, 20)


def saved(image, format_name="PNG", **options):
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def read(content, size=None):
    """Pixels, (H, W, 3) as integers, and the rules that decided them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        own_size, rules = images.inspect(io.BytesIO(content), content, upright=True)
        return images.read(io.BytesIO(content), size or own_size, upright=True).astype(int), rules


def red(mode, alpha=None):
    image = Image.new("RGB", (4, 4), RED)
    if alpha is not None:
        image.putalpha(alpha)
    return image.convert(mode)


BLENDED = tuple(round((colour * 128 + 255 * 127) / 255) for colour in RED)
GREY = 80  # of RED


@pytest.mark.parametrize(
    ("image", "format_name", "options", "expected", "rules"),
    [
        (red("RGB"), "PNG", {}, RED, []),
        (red("P"), "PNG", {}, None, []),
        (red("RGB").quantize(4), "GIF", {}, RED, []),
        (red("L"), "PNG", {}, (GREY,) * 3, []),
        (red("CMYK"), "TIFF", {}, RED, []),
        (red("CMYK"), "JPEG", {"quality": 95}, RED, []),
        (Image.new("1", (4, 4), 1), "PNG", {}, (255,) * 3, []),
        (Image.new("1", (4, 4), 0), "BMP", {}, (0,) * 3, []),
        (red("RGBA", 255), "PNG", {}, RED, []),
        (red("RGBA", 128), "PNG", {}, BLENDED, ["transparency"]),
        (red("RGBA", 0), "PNG", {}, (255,) * 3, ["transparency"]),
        (red("RGBA", 128), "TIFF", {}, BLENDED, ["transparency"]),
        (red("RGBA", 128), "WEBP", {"lossless": True}, BLENDED, ["transparency"]),
        (red("LA", 128), "PNG", {}, (round((GREY * 128 + 255 * 127) / 255),) * 3, ["transparency"]),
        (red("RGBA", 128).quantize(4), "PNG", {}, BLENDED, ["transparency"]),
        (red("RGB").quantize(4), "PNG", {"transparency": 0}, (255,) * 3, ["transparency"]),
        (red("RGB").quantize(4), "GIF", {"transparency": 0}, (255,) * 3, ["transparency"]),
        (red("RGB"), "PNG", {"transparency": RED}, (255,) * 3, ["transparency"]),
    ],
)
def test_modes(image, format_name, options, expected, rules):
    pixels, found = read(saved(image, format_name, **options))
    assert found == rules
    if expected is None:
        expected = np.asarray(image.convert("RGB"))
    assert abs(pixels - expected).max() <= 2


RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


@pytest.mark.parametrize(
    ("image", "format_name"),
    [
        (Image.fromarray(RAMP), "PNG"),
        (Image.fromarray(RAMP), "TIFF"),
        (Image.fromarray(RAMP.astype(">u2")), "TIFF"),
        (Image.fromarray(RAMP.astype(np.int32)), "PPM"),
    ],
)
def test_sixteen_bits_are_scaled_by_their_range(image, format_name):
    pixels, rules = read(saved(image, format_name))
    assert rules == ["depth"]
    assert (pixels == np.arange(256).reshape(16, 16, 1)).all()


def test_sixteen_bits_with_white_as_zero_are_inverted():
    content = saved(Image.fromarray(RAMP), "TIFF", tiffinfo={262: 0})
    assert (read(content)[0] == 255 - np.arange(256).reshape(16, 16, 1)).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pixels_whose_range_is_not_known_are_refused(kind):
    content = saved(Image.fromarray(np.ones((4, 4), kind)), "TIFF")
    with pytest.raises(ValueError, match="range is not known: save it with 8 or 16 bits"):
        read(content)


def test_of_several_pictures_the_first_counts():
    pictures = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    for format_name in ("GIF", "TIFF", "PNG", "WEBP"):
        content = saved(pictures[0], format_name, save_all=True, append_images=pictures[1:])
        assert abs(read(content)[0] - RED).max() <= 6


def test_a_phone_file_of_two_pictures_is_read():
    exif = Image.Exif()
    exif[0x0112] = 8
    photo = Image.new("RGB", (16, 8), RED)
    content = saved(photo, "MPO", save_all=True, append_images=[photo.resize((8, 4))], exif=exif, quality=95)
    pixels, rules = read(content)
    assert (pixels.shape, rules) == ((16, 8, 3), ["orientation"])


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_every_format_with_exif_is_turned(format_name):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (32, 16), (0, 0, 0))
    photo.paste(RED, (0, 0, 32, 8))  # its upper half: upright, the right half
    options = (
        {"lossless": True} if format_name == "WEBP" else {"quality": 95} if format_name in ("JPEG", "AVIF") else {}
    )
    pixels, _ = read(saved(photo, format_name, exif=exif, **options))
    assert pixels.shape == (32, 16, 3)
    assert abs(pixels[:, 10:] - RED).mean() < 6 and pixels[:, :6].mean() < 6


def test_huge_images_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(images, "HUGE_PIXELS", 8)
    held = []
    original = images._rgb
    monkeypatch.setattr(images, "_rgb", lambda image: held.append(images._huge.locked()) or original(image))
    for side in (2, 4):
        read(saved(Image.new("RGB", (side, side), RED)))
    assert held == [False, True]


def test_metadata_behind_the_pixels_of_a_png_count():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (8, 4), RED)
    plain, marked = saved(picture), saved(picture, exif=exif)
    begin = marked.index(b"eXIf") - 4
    end = marked.index(b"IDAT") - 4
    late = plain[:-12] + marked[begin:end] + plain[-12:]
    pixels, rules = read(late)
    assert (pixels.shape, rules) == ((8, 4, 3), ["orientation"])


def test_damaged_metadata_of_a_sound_image_are_ignored():
    content = saved(Image.new("RGB", (8, 4), RED), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    pixels, rules = read(content)
    assert (pixels.shape, rules) == ((4, 8, 3), [])


@pytest.mark.parametrize("format_name", ["DDS", "BLP", "SPIDER", "TGA", "EPS", "ICO", "PCX", "JPEG2000"])
def test_other_formats_are_not_opened(format_name):
    image = red("P") if format_name == "BLP" else red("F") if format_name == "SPIDER" else red("RGB")
    with pytest.raises(Image.UnidentifiedImageError) as caught:
        read(saved(image, format_name))
    assert images.reason(caught.value).startswith("no JPEG")


@pytest.mark.parametrize("format_name", images.FORMATS)
def test_damaged_files_raise_or_give_pixels_and_a_reason(format_name):
    random = np.random.default_rng(0)
    whole = saved(Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)), format_name)
    damaged = [whole[: int(cut)] for cut in np.linspace(0, len(whole) - 1, 20)]
    for number in range(60):
        changed = bytearray(whole)
        for place in random.integers(0, min(len(whole), 200 if number % 2 else len(whole)), 3):
            changed[place] = random.integers(256)
        damaged.append(bytes(changed))
    refused = 0
    for content in damaged:
        try:
            pixels, _ = read(content, (8, 8))
            assert pixels.shape == (8, 8, 3)
        except Exception as error:
            refused += 1
            reason = images.reason(error)
            assert reason and len(reason.splitlines()) == 1
    assert refused >= 15
