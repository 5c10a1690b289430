"""Pictures as people have them, opened as upright RGB pictures in sRGB. Imports neither torch nor numpy."""

import contextlib
import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..errors import InputError, first_line

MAX_PIXELS = 500_000_000  # pixels; the largest camera sensors have fewer
JPEG_MARKER = re.compile(rb"\xff+([^\x00\x01\xd0-\xd8\xff])")  # of the header's segments
JPEG_SCAN, JPEG_END = b"\xda", b"\xff\xd9"  # coded data hold no end
MIN_ZEROS = 256  # at the end of a WebP image, which compressed data do not have
FAINT = 64  # of 255: the largest value of 14 bits in a file of 16
ORIENTATION, PHOTOMETRIC, BITS_PER_SAMPLE = 274, 262, 258  # EXIF and TIFF tags


def open_photo(file: Path, min_side: int | None = None) -> Image.Image:
    """Return a picture as RGB in sRGB, upright, 16 bits scaled to 8, on a white background.

    Args:
        file: the picture.
        min_side: a JPEG is decoded at a half, a quarter or an eighth of its size, in as much less time, where its
            shorter side keeps so many pixels; None decodes it whole.

    Raises:
        InputError: the file cannot be read or is not complete, it has more than 500 million pixels, or its format does
            not define which value is white.
    """
    with _naming(file), _open(file) as image:
        if min_side:
            image.draft(None, (min_side, min_side))
        return _to_rgb(image)


def read_size(file: Path) -> tuple[int, int]:
    """Return width and height in pixels as the header of a file tells them. Raises InputError."""
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    with _naming(file), Image.open(file) as image:
        return int(image.width), int(image.height)


def crop_square(image: Image.Image, side: int, position: float = 0.5) -> Image.Image:
    """Scale the shorter side to `side` pixels and crop the longer one: `position` 0 keeps its start, 1 its end."""
    short = min(image.size)
    left, top = ((length - short) * position for length in image.size)
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.Resampling.LANCZOS, box)


class Inspection(NamedTuple):
    """What is known of a picture: why it cannot be used (None if it can), and what may not be as the user expects.

    `side` is the shorter one, in pixels; `has_16_bits` is about the file; `is_faint` tells whether the picture is
    almost black or almost white, `is_flat` whether all pixels are equal; `digest` identifies the bytes of the file.
    """

    refusal: str | None
    side: int = 0
    has_pages: bool = False
    has_16_bits: bool = False
    is_faint: bool = False
    is_flat: bool = False
    digest: bytes = b""


def inspect_photo(file: Path) -> Inspection:
    """Open a picture to see whether it can be used."""
    try:
        with _naming(file), _open(file) as image:
            side, has_pages = min(image.size), image.format == "TIFF" and getattr(image, "n_frames", 1) > 1
            image.seek(0)  # to count the pages is to go to the last one
            raw_modes = (part[-1] if isinstance(part[-1], str) else part[-1][0] for part in image.tile if part[-1])
            has_16_bits = any(";16" in str(mode) for mode in raw_modes)  # such as I;16 or RGB;16B
            image.draft(None, (1, 1))  # decodes a JPEG at an eighth of its size, which takes a sixth of the time
            levels: Any = _to_rgb(image).getextrema()
            is_flat = _is_flat(levels) and _is_flat(open_photo(file).getextrema())
            digest = hashlib.sha256(file.read_bytes()).digest()
            darkest, brightest = min(low for low, _ in levels), max(high for _, high in levels)
            is_faint = brightest <= FAINT or darkest >= 255 - FAINT
            return Inspection(None, side, has_pages, has_16_bits, is_faint, is_flat, digest)
    except InputError as error:
        return Inspection(str(error))


def _is_flat(levels: Any) -> bool:
    return all(low == high for low, high in levels)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Raise every error as an InputError that names the file."""
    try:
        yield
    except Exception as error:  # Pillow's readers raise many types, also those of struct and zlib
        raise InputError(f"{file} cannot be read: {first_line(error)}; repair or remove it") from error


def _open(file: Path) -> Image.Image:
    """Return a picture that is not decoded yet, whatever its size and the length of its comments."""
    Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
    content = file.read_bytes()  # given a file name, Pillow maps a TIFF into memory and corrupts it when it rotates it
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError("it is not a picture of a known format") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than 500 million; make it smaller")
    if image.format in ("JPEG", "MPO") and not _has_end_of_jpeg(content):
        raise ValueError("its end is missing, so a part of it would be grey")
    if image.format == "WEBP" and _webp_image(content).endswith(bytes(MIN_ZEROS)):
        raise ValueError("it ends in zeros, so a part of it is missing")
    return image


def _webp_image(content: bytes) -> bytes:
    """Return the coded image of a WebP file (its RIFF chunk, without metadata), b"" for an animation."""
    place = 12
    while place < len(content):
        name, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return content[place + 8 : place + 8 + size]
        place += 8 + size + size % 2
    return b""


def _has_end_of_jpeg(content: bytes) -> bool:
    """Return whether there is an end marker behind the header (ITU-T T.81, annex B), where a thumbnail has its own."""
    place = 2
    while marker := JPEG_MARKER.search(content, place):
        if marker[1] == JPEG_SCAN:
            return content.endswith(JPEG_END) or content.find(JPEG_END, marker.end()) >= 0
        place = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big")
    return False


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation, profile = None, image.info.get("icc_profile")
    with contextlib.suppress(Exception):  # EXIF without any structure; damage to other tags does not matter
        orientation = image.getexif().get(ORIENTATION)
    if image.mode.startswith(("I", "F")):
        image = _scale_to_8_bits(image)
    has_alpha = "transparency" in image.info or image.mode.endswith(("A", "a"))
    if has_alpha or image.mode == "P":
        image = image.convert("RGBA" if has_alpha else "RGB")
    image = _to_srgb(image, profile)
    if has_alpha:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()  # else Pillow would write EXIF anew, and fail at damaged tags
    image.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(image)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours of a picture with an ICC profile; a profile that is damaged or of another mode is ignored."""
    if profile:
        with contextlib.suppress(ImageCms.PyCMSError, OSError, ImportError):
            source, target = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            colours = image.convert("RGB") if image.mode == "RGBA" else image
            converted: Any = ImageCms.profileToProfile(colours, source, target, outputMode="RGB")
            if image.mode == "RGBA":
                converted.putalpha(image.getchannel("A"))
            return converted  # type: ignore[no-any-return]
    return image


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a picture of 16-bit grey values, of PGM any depth above 8; Pillow's own conversion clips at 255."""
    tags = getattr(image, "tag_v2", {})
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not is_16_bit or tags.get(BITS_PER_SAMPLE, (16,)) != (16,):
        raise ValueError(f"its format ({image.mode}) does not define which value is white; save it with 8 or 16 bits")
    grey = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    grey.info.pop("transparency", None)  # it is a 16-bit value
    is_white_zero = tags.get(PHOTOMETRIC) == 0  # Pillow applies it to 8-bit pictures only
    return ImageOps.invert(grey) if is_white_zero else grey
