"""What the processes of a queue say while several pictures are drawn at a time: lines of people's words, each with the
number of its row."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

_LINE_EVERY = 30.0  # seconds between two lines on the progress of a row


class Listener:
    """Translates the lines of `tiler render --log-json`, and lets those that are none through; `silent` takes the
    events for read, and `as_json` passes them on, with the row. `noun` is what lines call a row."""

    def __init__(self, say: Callable[[str], None], *, silent: bool, as_json: bool = False, noun: str = "row") -> None:
        self._say, self._silent, self._as_json, self._noun = say, silent, as_json, noun
        self._told = dict[int, float]()  # by row: when its progress was last told

    def hear(self, row: int, line: bytes) -> None:
        """Take a line of a row's process."""
        text = line.decode(errors="replace")
        try:
            event = json.loads(text)
            said = self._of_event(row, event) if event["event"] else ""
            if self._as_json:
                self._say(json.dumps({"row": row, **event}))
                return
        except (ValueError, KeyError, TypeError):
            said = text.strip()
        if said:
            self._say(f"{self._noun} {row}: {said}")

    def _of_event(self, row: int, event: dict[str, Any]) -> str:
        if self._silent:
            return ""
        match event["event"]:
            case "note":
                return f"note: {event['text']}"
            case "phase_started":
                self._told[row] = time.monotonic()
            case "phase_done":
                return (
                    f"{event['name']}: done in {event['seconds']:.1f} s, peak {event['peak_rss_bytes'] / 1e6:,.0f} MB"
                )
            case "progress" if time.monotonic() - self._told.get(row, 0.0) > _LINE_EVERY:
                self._told[row] = time.monotonic()
                return f"{event['name']}: {event['detail']}"
        return ""
