"""AUTOMATIC1111's `parameters` text, read as its many writers have it: fields that make no sense lose only
themselves."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_KEY = re.compile(r"\s*([^:,\n\"{}\[\]]{1,60}?):[ \t]*")


class Infotext(NamedTuple):
    """A picture's prompts and the fields behind them; `negative_prompt` is None where the text has none."""

    prompt: str
    negative_prompt: str | None
    fields: dict[str, str]


def parse_infotext(text: str) -> Infotext:
    """Fields begin at the last line that starts with `Steps: ` and holds three of them or more; all before it is
    prompt."""
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
    """`Key: value` pairs with commas between them; a value may be a JSON text, list or object with commas inside."""
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
