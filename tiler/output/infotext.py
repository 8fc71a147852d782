"""Read AUTOMATIC1111's `parameters` text in the variants of its many writers. A malformed field affects only itself."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_KEY = re.compile(r"\s*([^:,\n\"{}\[\]]{1,60}?):[ \t]*")


class Infotext(NamedTuple):
    """A picture's prompts and the fields that follow them; `negative_prompt` is None if the text has none."""

    prompt: str
    negative_prompt: str | None
    fields: dict[str, str]


def parse_infotext(text: str) -> Infotext:
    """Split a text into prompts and fields. The fields start at the last line that begins with `Steps: ` and contains
    at least three of them; everything before it is prompt."""
    lines = text.replace("\r\n", "\n").split("\n")
    fields: dict[str, str] = {}
    for first in range(len(lines) - 1, -1, -1):
        if lines[first].lstrip().startswith("Steps: ") and len(found := _fields("\n".join(lines[first:]))) >= 3:
            fields, lines = found, lines[:first]
            break
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), None)
    if at is None:
        return Infotext("\n".join(lines).strip(), None, fields)
    negative = "\n".join([lines[at].removeprefix("Negative prompt:"), *lines[at + 1 :]])
    return Infotext("\n".join(lines[:at]).strip(), negative.strip(), fields)


def _fields(text: str) -> dict[str, str]:
    """Parse comma-separated `Key: value` pairs. A value may be a JSON string, list or object that contains commas."""
    found: dict[str, str] = {}
    at, decoder = 0, json.JSONDecoder(strict=False)
    while (match := _KEY.match(text, at)) is not None:
        at = match.end()
        value = None
        if text[at : at + 1] in ('"', "{", "["):
            try:
                decoded, end = decoder.raw_decode(text, at)
                value = decoded if isinstance(decoded, str) else text[at:end]
                at = end
            except (ValueError, RecursionError):
                value = None
        end = text.find(",", at)
        end = len(text) if end < 0 else end
        found.setdefault(match[1].strip(), text[at:end].strip() if value is None else value)
        at = end + 1
    return found
