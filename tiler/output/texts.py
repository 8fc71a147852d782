"""Read the texts in a picture's file, whichever program wrote it: PNG chunks, EXIF and XMP of JPEG, WebP and AVIF, the
comment of a JPEG, tags of TIFF."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tiler.errors import ModelError, StorageError, UsageError
from tiler.output.exif import EXIF_IFD, UNICODE, USER_COMMENT, parameters_in, request_in

if TYPE_CHECKING:
    from PIL import Image

_MOST = 16_000_000  # bytes of text; a picture with more is refused without reading on
_DESCRIPTION, _MAKE, _MODEL = 270, 0x010F, 0x0110
_KEY = b"parameters\0"


def read_texts(path: Path) -> dict[str, str]:
    """Return the texts by their PNG keyword; EXIF's comment and TIFF's description become `parameters`. Raises
    UsageError if the file is no picture, ModelError if it has too much text, and StorageError."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head == b"\x89PNG\r\n\x1a\n":
                return _of_png(file)
        if head.startswith(b"%PDF-"):
            raise UsageError(
                f"{path}: PDF files hold no settings that tiler reads; give a PNG, JPEG, WebP, AVIF or TIFF"
            )
        return _of_exif(path)
    except (struct.error, zlib.error) as error:
        raise UsageError(f"{path}: the file is damaged ({error}); take another copy") from error
    except _TooLong as error:
        raise ModelError(
            f"{path}: it holds more than {_MOST // 10**6} MB of text, too much for a picture's settings"
        ) from error
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such picture; check the path") from error
    except OSError as error:
        if error.errno is None:  # raised by Pillow
            raise UsageError(f"{path}: cannot be read as a picture; give a PNG, JPEG, WebP, AVIF or TIFF") from error
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


class _TooLong(Exception):
    """The file has more text than _MOST."""


def _of_png(file: BinaryIO) -> dict[str, str]:
    texts: dict[str, str] = {}
    left = _MOST
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind not in (b"tEXt", b"iTXt", b"zTXt"):
            file.seek(length + 4, 1)
            continue
        if length > left:
            raise _TooLong
        data = file.read(length)
        file.seek(4, 1)
        left -= length
        key, text = _chunk_text(kind, data, left)
        left -= len(text)
        texts.setdefault(key, text)
    return texts


def _chunk_text(kind: bytes, data: bytes, most: int) -> tuple[str, str]:
    """Return a text chunk's keyword and text: W3C PNG (third edition), 11.3.3. Many tools write UTF-8 instead of
    Latin-1."""
    name, _, rest = data.partition(b"\0")
    if kind == b"zTXt":
        rest = _inflated(rest[1:], most)
    elif kind == b"iTXt":
        compressed, rest = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]
        rest = _inflated(rest, most) if compressed else rest
    return name.decode("latin-1"), _decoded(rest)


def _inflated(data: bytes, most: int) -> bytes:
    stream = zlib.decompressobj()
    text = stream.decompress(data, max(1, most))
    if stream.unconsumed_tail:
        raise _TooLong
    return text


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _of_exif(path: Path) -> dict[str, str]:
    texts: dict[str, str] = {}
    with opened(path) as picture:
        exif, comment = _exif_of(picture)
        if isinstance(comment, bytes):
            texts["parameters"] = _user_comment(comment[:_MOST])
        elif isinstance(comment, str):
            texts["parameters"] = comment[:_MOST]
        elif isinstance(description := exif.get(_DESCRIPTION), str):
            texts["parameters"] = _decoded(description.encode("latin-1", "replace")[:_MOST])
        for tag in (_MAKE, _MODEL):  # ComfyUI's WebP: "prompt:{…}", "workflow:{…}"
            key, colon, text = str(exif.get(tag, "")).partition(":")
            if colon and key.lower() in ("prompt", "workflow"):
                texts[key.lower()] = text[:_MOST]
        packet: Any = picture.info.get("xmp")
        if isinstance(packet, bytes):
            if (request := request_in(packet[:_MOST])) is not None:
                texts["tiler"] = request
            if (parameters := parameters_in(packet[:_MOST])) is not None:
                texts.setdefault("parameters", parameters)
        segment: Any = picture.info.get("comment")
        if isinstance(segment, bytes) and segment.startswith(_KEY):  # a JPEG of stable-diffusion.cpp
            texts.setdefault("parameters", _decoded(segment[len(_KEY) : _MOST]).rstrip("\0"))
    return texts


def _exif_of(picture: Image.Image) -> tuple[Image.Exif, Any]:
    """Return a picture's EXIF and the user's comment in it. Damaged EXIF counts as none, since XMP may still hold the
    request."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's warnings of damage
        try:
            exif = picture.getexif()
            return exif, exif.get_ifd(EXIF_IFD).get(USER_COMMENT)
        except (SyntaxError, ValueError, KeyError, TypeError):
            return Image.Exif(), None


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture of any size, reading only its header. Pillow's size limit is meant for pictures that are
    decoded."""
    from PIL import Image

    most, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        picture = Image.open(path)
    finally:
        Image.MAX_IMAGE_PIXELS = most
    with picture:
        yield picture


def _user_comment(data: bytes) -> str:
    """Decode a user's comment: EXIF 2.3, 4.6.5. Eight bytes name the encoding. UTF-16 occurs in either byte order,
    which Latin letters reveal."""
    code, text = data[:8], data[8:]
    if code == UNICODE:
        little = text[1::2].count(0) > text[0::2].count(0)
        return text.decode("utf-16-le" if little else "utf-16-be", "replace").rstrip("\0")
    return _decoded(text if code in (b"ASCII\0\0\0", bytes(8)) else data).rstrip("\0")
