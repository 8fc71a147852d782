"""What a picture says of itself where there are no PNG chunks: AUTOMATIC1111's line in EXIF, all of the request in
XMP."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from tiler.output.metadata import XMP
from tiler.output.profile import srgb_profile

USER_COMMENT, EXIF_IFD = 0x9286, 0x8769  # EXIF 2.3, 4.6.5 and 4.6.3
UNICODE = b"UNICODE\0"
_NAMESPACE = "urn:tiler:picture#"
_MOST = 65_000  # bytes: a segment of a JPEG, which holds either, has 65,533
_BEGIN = '<rdf:Description rdf:about="" '
_REQUEST = re.compile(r"""\btiler:request=(["'])(.*?)\1|<tiler:request>(.*?)</tiler:request>""", re.DOTALL)


def said_of(texts: Mapping[str, str]) -> dict[str, bytes]:
    """What Pillow's `save` takes of a picture beside its pixels: the sRGB profile, and EXIF and XMP where `texts` give
    some."""
    said = {"icc_profile": srgb_profile(), "exif": exif_of(texts), "xmp": xmp_of(texts)}
    return {name: data for name, data in said.items() if data}


def exif_of(texts: Mapping[str, str]) -> bytes:
    """EXIF data with `texts["parameters"]` as the user's comment, as AUTOMATIC1111 writes it; a text that is too long
    for a JPEG ends early. Empty without one."""
    from PIL import Image

    if not (text := texts.get("parameters", "")):
        return b""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", "replace")[:_MOST]
    return exif.tobytes()


def xmp_of(texts: Mapping[str, str]) -> bytes:
    """The XMP packet in `texts`, with `texts["tiler"]` inside unless that is too long for a JPEG. Empty without one."""
    packet = texts.get(XMP, "")
    said = html.escape(texts.get("tiler", ""))
    whole = packet.replace(_BEGIN, f'{_BEGIN}xmlns:tiler="{_NAMESPACE}" tiler:request="{said}" ', 1) if said else packet
    data = whole.encode(errors="replace")
    return data if len(data) <= _MOST else packet.encode(errors="replace")[:_MOST]


def request_in(packet: bytes) -> str | None:
    """`texts["tiler"]` as `xmp_of` wrote it, also where another program has made an element of the attribute."""
    match = _REQUEST.search(packet.decode(errors="replace"))
    return None if match is None else html.unescape(match[2] if match[2] is not None else match[3])
