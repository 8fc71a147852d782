"""Reports which rows of the fault table in tests/README.md a test run has covered."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


def read_rows(text: str) -> dict[int, list[str]]:
    """The tests of each row, like `weights/test_index.py::test_crafted_headers`."""
    rows = re.findall(r"^\| (\d+) \|(.*)$", text, re.MULTILINE)
    return {int(number): re.findall(r"`([\w/]+\.py::test_\w+)`", row) for number, row in rows}


class Rows:
    """A pytest plugin that writes a line into the file `told` at the end: "48 rows: 47 run, 1 skipped (35: needs
    root)". A row counts as run if all its tests were run."""

    def __init__(self, told: Path, rows: dict[int, list[str]]) -> None:
        self._told, self._rows = told, rows
        self._ran, self._why = set[str](), dict[str, str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.partition("[")[0].removeprefix("tests/")
        if report.when == "call" and report.passed:
            self._ran.add(name)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._why[name] = reason.removeprefix("Skipped: ")
        elif report.failed:
            self._why[name] = "failed"

    def pytest_unconfigure(self) -> None:
        self._told.write_text(f"{self}\n")

    def __str__(self) -> str:
        skipped = defaultdict[str, list[str]](list)
        for number, names in self._rows.items():
            left = [name for name in names if name not in self._ran or self._why.get(name) == "failed"]
            if left:
                skipped[self._why.get(left[0], "not selected")].append(str(number))
        lost = sum(map(len, skipped.values()))
        why = "; ".join(f"{', '.join(numbers)}: {reason}" for reason, numbers in skipped.items())
        return f"{len(self._rows)} rows: {len(self._rows) - lost} run, {lost} skipped{f' ({why})' if why else ''}"
