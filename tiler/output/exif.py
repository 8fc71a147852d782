"""A picture's metadata in formats without PNG chunks: AUTOMATIC1111's line in EXIF, the complete request in XMP."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from tiler.output.metadata import XMP
from tiler.output.profile import srgb_profile

USER_COMMENT, EXIF_IFD = 0x9286, 0x8769  # EXIF 2.3, 4.6.5 and 4.6.3
UNICODE = b"UNICODE\0"
_NAMESPACE = "urn:tiler:picture#"
_MOST = 65_000  # bytes: EXIF and XMP each lie in one segment of a JPEG, which has 65,533
_BEGIN = '<rdf:Description rdf:about="" '
_REQUEST = re.compile(r"""\btiler:request=(["'])(.*?)\1|<tiler:request>(.*?)</tiler:request>""", re.DOTALL)
_SDCPP = re.compile(r"<sdcpp:parameters>(.*?)</sdcpp:parameters>", re.DOTALL)  # a WebP of stable-diffusion.cpp


def said_of(texts: Mapping[str, str]) -> dict[str, bytes]:
    """Return the metadata arguments of Pillow's `save`: the sRGB profile, and EXIF and XMP if `texts` provide them."""
    said = {"icc_profile": srgb_profile(), "exif": exif_of(texts), "xmp": xmp_of(texts)}
    return {name: data for name, data in said.items() if data}


def exif_of(texts: Mapping[str, str]) -> bytes:
    """Return EXIF data with `texts["parameters"]` as the user's comment, as AUTOMATIC1111 writes it, or b"" without
    that text. A text too long for a JPEG is cut."""
    from PIL import Image

    if not (text := texts.get("parameters", "")):
        return b""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", "replace")[:_MOST]
    return exif.tobytes()


def xmp_of(texts: Mapping[str, str]) -> bytes:
    """Return the XMP packet in `texts`, or b"" without one. `texts["tiler"]` is put inside unless that is too long for
    a JPEG."""
    packet = texts.get(XMP, "")
    said = html.escape(texts.get("tiler", ""))
    whole = packet.replace(_BEGIN, f'{_BEGIN}xmlns:tiler="{_NAMESPACE}" tiler:request="{said}" ', 1) if said else packet
    data = whole.encode(errors="replace")
    return data if len(data) <= _MOST else packet.encode(errors="replace")[:_MOST]


def request_in(packet: bytes) -> str | None:
    """Return `texts["tiler"]` as `xmp_of` wrote it, even if another program has turned the attribute into an
    element."""
    match = _REQUEST.search(packet.decode(errors="replace"))
    return None if match is None else html.unescape(match[2] if match[2] is not None else match[3])


def parameters_in(packet: bytes) -> str | None:
    """Return the settings that stable-diffusion.cpp writes into a WebP, or None."""
    match = _SDCPP.search(packet.decode(errors="replace"))
    return None if match is None else html.unescape(match[1])
