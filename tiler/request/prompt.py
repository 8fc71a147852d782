"""The grammar of prompts that users of AUTOMATIC1111 type: tags, AND, schedules, emphasis and BREAK, in the order in
which they are read. Pure: texts in, values out; nothing here knows a tokenizer or a model.

    (a), ((a)), (a:1.3), [a]     more or less attention: × 1.1, × 1.21, × 1.3, ÷ 1.1
    \\( \\) \\[ \\] \\\\              these characters themselves
    [a:b:0.5], [a:0.5], [a::8]   a before and b from a share of the steps, or from a step, on
    [a|b]                        a and b by turns
    a BREAK b                    b begins a chunk of the text encoder
    a AND b :0.5                 two prompts, whose predictions are added
    <lora:NAME:0.8>              a tag: no text, handed out as a value

The grammar is described at https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Union

MORE = 1.1  # the weight of a pair of round brackets; square ones divide by it
MAX_DEPTH = 64  # of nested brackets; deeper ones are text
MAX_WEIGHT = 1000.0  # of one bracket, or of a prompt that AND joins

_TAG = re.compile(r"<(\w+):([^<>]*)>")
_OPEN_TAG = re.compile(r"<(?:lora|lyco):[^\s<>]*")  # once whole tags are cut
_AND = re.compile(r"\bAND\b")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_FACTOR = re.compile(r"(.*?)(?::\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*)?", re.DOTALL)  # of a complete sub-prompt
_MARKS = re.compile(r"\\.|[\[\]():|]", re.DOTALL)  # of schedules; or any escaped character
_WHEN = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*")
_WEIGHT = re.compile(r":\s*([+-]?[.\d]+)\s*\)")
_PIECE = re.compile(r"\\[()\[\]\\]|[\\()\[\]:]|[^\\()\[\]:]+")


class Tag(NamedTuple):
    """A `<kind:first:second…>` tag of a prompt, like `<lora:NAME:0.8>`, split at its colons."""

    kind: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"<{':'.join((self.kind, *self.arguments))}>"


class Fragment(NamedTuple):
    """A run of text with one weight (default 1)."""

    text: str
    weight: float = 1.0


class Switch(NamedTuple):
    """`[before:after:when]`; `when` is a number of steps, or a share of them."""

    before: Text
    after: Text
    when: float
    share: bool


class Turns(NamedTuple):
    """`[a|b|…]`: the options alternate from step to step."""

    options: tuple[Text, ...]


Text = tuple[Union[str, "Switch", "Turns"], ...]
"""A text that may change from step to step."""


class SubPrompt(NamedTuple):
    """One of the prompts that AND joins, and its factor in the guidance."""

    text: Text
    factor: float = 1.0


class Stage(NamedTuple):
    """The stage whose `steps` a schedule's `when` counts: the guide or the canvas. `guide_steps` is the number of guide
    steps before this stage, 0 without a guide."""

    steps: int
    guide_steps: int = 0

    def begun(self, switch: Switch) -> int:
        """The step of this stage, from 0 to `steps`, at which `switch` changes. After a guide, shares above 1 and steps
        beyond the guide's refer to the canvas: 1.5 means half of the canvas's steps."""
        if switch.share:
            at = (switch.when - (1 if self.guide_steps else 0)) * self.steps
        else:
            at = switch.when - self.guide_steps
        return int(min(max(at, 0), self.steps))


class ParsedPrompt(NamedTuple):
    """A prompt without its tags, split at AND into at least one part."""

    prompts: tuple[SubPrompt, ...]
    tags: tuple[Tag, ...]


def parse_prompt(text: str, *, splits: bool = True) -> ParsedPrompt:
    """Parse a complete prompt. Without `splits`, as for negative prompts, AND is an ordinary word. Every text is a
    valid prompt: anything that is not syntax is text."""
    text, tags = cut_tags(text)
    parts = split_prompts(text) if splits else ((text, 1.0),)
    return ParsedPrompt(tuple(SubPrompt(parse_schedule(part), factor) for part, factor in parts), tags)


def cut_tags(text: str) -> tuple[str, tuple[Tag, ...]]:
    """Return the text without its tags, and the tags in order."""
    tags = tuple(Tag(kind, tuple(rest.split(":"))) for kind, rest in _TAG.findall(text))
    return _TAG.sub("", text), tags


def unclosed(text: str, *, splits: bool = True, brackets: bool = True) -> Iterator[str]:
    """What a prompt opens and never closes, in words for its user: tags, and brackets unless they are only text.
    `splits` as for `parse_prompt`: AND ends what is open."""
    text, _ = cut_tags(text)
    for tag in _OPEN_TAG.findall(text):
        yield f"{_short(tag)!r} has no > at its end, and is read as text"
    parts = [part.strip() for part, _ in split_prompts(text)] if splits else [text]
    for number, part in enumerate(parts) if brackets else ():
        if starts := _open_brackets(part):
            mark, what = part[starts[0]], "all that follows" if number + 1 == len(parts) else "all up to AND"
            which = f"{mark} is not closed and weighs"
            if len(starts) > 1:
                which = f"{len(starts)} brackets are not closed and weigh"
            yield f"{which} {what}, from {_short(part[starts[0] :])!r} on; \\{mark} is the character itself"


def _open_brackets(text: str) -> list[int]:
    """Where the brackets are that are never closed."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for piece in _PIECE.finditer(text):
        if piece[0] in opened:
            opened[piece[0]].append(piece.start())
        elif starts := opened.get({")": "(", "]": "["}.get(piece[0], ""), []):
            starts.pop()
    return sorted([*opened["("], *opened["["]])


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:29]}…"


def split_prompts(text: str) -> tuple[tuple[str, float], ...]:
    """Return (text, factor) for each prompt that AND joins. The factor follows a colon at the end of a part, and is 1
    without one; in a prompt without AND, the colon is text."""
    parts = _AND.split(text)
    if len(parts) == 1:
        return ((text, 1.0),)
    found = []
    for part in parts:
        match = _FACTOR.fullmatch(part)
        assert match is not None, "every text is one without a factor"
        factor = None if match[2] is None else _number(match[2])
        found.append((part, 1.0) if factor is None else (match[1].rstrip(), factor))
    return tuple(found)


class _Open:
    """An open bracket and its content so far, split at `|` and at `:`."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.parts: list[list[str | Switch | Turns]] = [[]]
        self.separators: list[str] = []
        self.paired = True  # whether every round bracket in it has a partner

    def add(self, item: str | Switch | Turns) -> None:
        self.parts[-1].append(item)

    def written(self) -> list[str | Switch | Turns]:
        """The bracket and its content as they were typed."""
        items: list[str | Switch | Turns] = [self.mark, *self.parts[0]]
        for separator, part in zip(self.separators, self.parts[1:], strict=True):
            items += [separator, *part]
        return items

    def closed(self) -> Switch | Turns | None:
        """The meaning of a square bracket; None if it is emphasis."""
        if self.mark != "[" or not self.paired or not self.separators:
            return None
        texts = [_joined(part) for part in self.parts]
        if set(self.separators) == {"|"}:
            return Turns(tuple(texts))
        *words, last = texts
        number = _WHEN.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
        if set(self.separators) != {":"} or len(words) > 2 or number is None:
            return None
        before, after = words if len(words) == 2 else ((), words[0])
        return Switch(before, after, float(number[1]), "." in number[1])


def parse_schedule(text: str) -> Text:
    """Parse the parts of a text that change by step; escapes and emphasis stay as typed. Unmatched brackets, and
    brackets without a number after their last colon, are not schedules."""
    stack, end = [_Open("")], 0
    for match in _MARKS.finditer(text):
        if match.start() > end:
            stack[-1].add(text[end : match.start()])
        mark, end = match[0], match.end()
        top = stack[-1]
        if mark in ("[", "(") and len(stack) <= MAX_DEPTH:
            stack.append(_Open(mark))
        elif mark in (":", "|") and top.mark == "[":
            top.separators.append(mark)
            top.parts.append([])
        elif mark in ("]", ")") and top.mark + mark in ("[]", "()"):
            stack.pop()
            if (changing := top.closed()) is not None:
                stack[-1].add(changing)
            else:
                for item in (*top.written(), mark):
                    stack[-1].add(item)
        else:
            top.add(mark)
            if mark in ("(", ")"):
                top.paired = False
    if end < len(text):
        stack[-1].add(text[end:])
    return _joined([item for opened in stack for item in opened.written()])


def _joined(items: Sequence[str | Switch | Turns]) -> Text:
    """Join adjacent strings, and drop empty ones."""
    joined: list[str | Switch | Turns] = []
    words: list[str] = []
    for item in (*items, None):
        if isinstance(item, str):
            words.append(item)
            continue
        if whole := "".join(words):
            joined.append(whole)
        words.clear()
        if item is not None:
            joined.append(item)
    return tuple(joined)


def text_at(text: Text, step: int, stage: Stage) -> str:
    """The text at `step` of a stage, from 0."""
    said = []
    for item in text:
        if isinstance(item, str):
            said.append(item)
        elif isinstance(item, Turns):
            said.append(text_at(item.options[step % len(item.options)], step, stage))
        else:
            said.append(text_at(item.before if step < stage.begun(item) else item.after, step, stage))
    return "".join(said)


Sections = tuple[tuple[Fragment, ...], ...]
"""Fragments, parted where BREAK stands."""


def parse_emphasis(text: str, warn: Callable[[str], None] = lambda note: None) -> Sections:
    """Split a text into fragments with weights; adjacent fragments of equal weight are merged. Weights of nested
    brackets multiply, and an unclosed bracket extends to the end. `warn` is called with the text of a weight that is
    not a valid number."""
    sections: list[list[Fragment]] = [[]]
    # The starts of the open brackets: (section, fragment).
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}

    def here() -> tuple[int, int]:
        return len(sections) - 1, len(sections[-1])

    def add(said: str) -> None:
        section = sections[-1]
        if section and section[-1].weight == 1 and not any(starts[-1:] == [here()] for starts in opened.values()):
            section[-1] = Fragment(section[-1].text + said)
        else:
            section.append(Fragment(said))

    def weigh(start: tuple[int, int], weight: float) -> None:
        for number in range(start[0], len(sections)):
            first = start[1] if number == start[0] else 0
            section = sections[number]
            section[first:] = [Fragment(f.text, f.weight * weight) for f in section[first:]]

    position = 0
    while position < len(text):
        if opened["("] and (match := _WEIGHT.match(text, position)) is not None:
            weight = _number(match[1])
            if weight is not None:
                weigh(opened["("].pop(), weight)
                position = match.end()
                continue
            warn(f"a weight of {match[1][:20]!r} is no number up to {MAX_WEIGHT:g}: it is read as text")
        piece = _PIECE.match(text, position)
        assert piece is not None, "every character begins a piece"
        said, position = piece[0], piece.end()
        if said in opened and sum(map(len, opened.values())) < MAX_DEPTH:
            opened[said].append(here())
        elif said == ")" and opened["("]:
            weigh(opened["("].pop(), MORE)
        elif said == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / MORE)
        elif said.startswith("\\"):
            add(said[1:])
        else:
            first, *others = _BREAK.split(said)
            add(first)
            sections += [[Fragment(part)] for part in others]
    for mark, weight in (("(", MORE), ("[", 1 / MORE)):
        for start in opened[mark]:
            weigh(start, weight)
    return tuple(_merged(section) for section in sections)


def _number(text: str) -> float | None:
    """Parse a number; None if the text is not a number or the number is too large."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= MAX_WEIGHT else None


def _merged(section: list[Fragment]) -> tuple[Fragment, ...]:
    merged: list[Fragment] = []
    for fragment in section:
        if merged and merged[-1].weight == fragment.weight:
            merged[-1] = Fragment(merged[-1].text + fragment.text, fragment.weight)
        else:
            merged.append(fragment)
    return tuple(merged) or (Fragment(""),)
