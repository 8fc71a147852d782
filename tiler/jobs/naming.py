"""Picture names from templates like `{index:03}-{prompt}.png`. Such names cannot lead out of their folder."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from tiler.errors import UsageError

_PLACEHOLDER = re.compile(r"\{(index|seed|prompt)(?::0?(\d))?\}")
_LONGEST = 60  # bytes from a prompt in a name
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def has_placeholder(template: str, *names: str) -> bool:
    """Whether the template contains a placeholder: one of `names` if any are given."""
    return any(not names or match[1] in names for match in _PLACEHOLDER.finditer(template))


def fill(template: str, *, index: int, seed: int | None, prompt: str | None) -> str:
    """Replace the placeholders `{index}`, `{seed}` and `{prompt}`; numbers may have leading zeros, as in `{index:03}`.
    Raises UsageError for other braces, and for `{seed}` if the seed is unknown."""
    if seed is None and has_placeholder(template, "seed"):
        raise UsageError(f"--output {template!r} needs a {{seed}}; give --seed, or use {{index}}")
    values = {"index": str(index), "seed": str(seed), "prompt": _slug(prompt)}
    text = _PLACEHOLDER.sub(lambda found: values[found[1]].rjust(int(found[2] or 0), "0"), template)
    if "{" in _PLACEHOLDER.sub("", template):
        raise UsageError(
            f"--output {template!r}: the placeholders are {{index}}, {{index:03}}, {{seed}} and {{prompt}}"
        )
    return text


def below(root: Path, name: str) -> Path:
    """The path of `name`, which must lie in the folder `root` or in one below it. Raises UsageError."""
    parts = PurePosixPath(name).parts
    bad = (
        not parts
        or name == "-"
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or "\0" in name
        or ":" in parts[0]
    )
    if bad or any(_RESERVED.fullmatch(part) for part in parts):
        raise UsageError(
            f"--output {name!r} is outside the folder {root}, or not a file name; give a name below it, like a/b.png"
        )
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"--output {name!r} leaves the folder {root} through a link; give a name below it")
    return path


def _slug(prompt: str | None) -> str:
    """The first words of a prompt, for use in a file name."""
    words = re.sub(r"[^\w]+", "-", prompt or "").strip("-").lower()
    return words.encode()[:_LONGEST].decode(errors="ignore").rstrip("-") or "picture"
