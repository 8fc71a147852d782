"""The colour profile embedded in every picture that tiler writes."""

from __future__ import annotations

import struct


def srgb_profile() -> bytes:
    """Return an ICC profile of sRGB that always has the same bytes: the date (bytes 24–35 of the header, ICC.1:2022) is
    fixed, and the optional checksum (bytes 84–99) is left out."""
    from PIL import ImageCms

    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    profile[84:100] = bytes(16)
    return bytes(profile)
