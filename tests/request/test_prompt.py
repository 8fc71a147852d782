"""The grammar of prompts, against results that AUTOMATIC1111's parser gave for the same texts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiler.request.prompt import (
    Fragment,
    Stage,
    Switch,
    Tag,
    Turns,
    cut_tags,
    parse_emphasis,
    parse_prompt,
    parse_schedule,
    split_prompts,
    text_at,
    unclosed,
)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("a", [("a", 1)]),
        ("(a)", [("a", 1.1)]),
        ("((a))", [("a", 1.21)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("(a:1.5)", [("a", 1.5)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("(a, (b:1.2):1.5)", [("a, ", 1.5), ("b", 1.8)]),
        (r"\(a\)", [("(a)", 1)]),
        ("\\\\", [("\\", 1)]),
        ("a\\", [("a", 1)]),
        ("a (((house:1.3)) (hill:0.5))", [("a ", 1), ("house", 1.573), (" ", 1.1), ("hill", 0.55)]),
        ("(a:1.2:1.3)", [("a:1.2", 1.3)]),
        ("(a:1.5", [("a:1.5", 1.1)]),
        ("[a", [("a", 1 / 1.1)]),
        ("a)", [("a)", 1)]),
        (":)", [(":)", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("", [("", 1)]),
        ("()", [("", 1)]),
        ("(cat)s", [("cat", 1.1), ("s", 1)]),
        ("a (b:1.0) c", [("a b c", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("aBREAKb", [("aBREAKb", 1)]),
    ],
)
def test_weights(text: str, fragments: list[tuple[str, float]]) -> None:
    (section,) = parse_emphasis(text)
    assert [f.text for f in section] == [text for text, _ in fragments]
    assert [f.weight for f in section] == pytest.approx([weight for _, weight in fragments])


def test_a_break_parts_a_text_also_within_brackets() -> None:
    assert parse_emphasis("a BREAK  b") == ((Fragment("a"),), (Fragment("b"),))
    assert parse_emphasis("(a BREAK b:1.5)") == ((Fragment("a", 1.5),), (Fragment("b", 1.5),))
    assert parse_emphasis("a, BREAK") == ((Fragment("a,"),), (Fragment(""),))


def test_a_weight_that_is_no_number_is_told() -> None:
    told: list[str] = []
    parse_emphasis("(a:1.2.3)", told.append)
    parse_emphasis(f"(a:{'9' * 400})", told.append)
    assert len(told) == 2 and "'1.2.3'" in told[0]


@pytest.mark.parametrize(
    ("text", "by_step"),
    [
        ("a [b:c:0.5]", ["a b", "a b", "a c", "a c"]),
        ("a [b:c:3]", ["a b", "a b", "a b", "a c"]),
        ("[b:c: 0.5 ]", ["b", "b", "c", "c"]),
        ("[a:0.25]", ["", "a", "a", "a"]),
        ("[a::0.25]", ["a", "", "", ""]),
        ("[a:1.2]", ["", "", "", ""]),  # 1.2 × 4 steps
        ("[a:b:-1]", ["b"] * 4),
        ("[a:b:0]", ["b"] * 4),
        ("[a|b]", ["a", "b", "a", "b"]),
        ("[a|b|c] d", ["a d", "b d", "c d", "a d"]),
        ("[a|]", ["a", "", "a", ""]),
        ("[a:[b|c]:1]", ["a", "c", "b", "c"]),
        ("[[a:b:1]:c:2]", ["a", "b", "c", "c"]),
        ("[(a:1.2):b:0.5]", ["(a:1.2)"] * 2 + ["b"] * 2),
        ("(a [b:c:0.5]", ["(a b"] * 2 + ["(a c"] * 2),
        (r"[a\:b:c:0.5]", [r"a\:b"] * 2 + ["c"] * 2),
        (r"\[a:b:0.5\]", [r"\[a:b:0.5\]"] * 4),
        ("[a:b:c:0.5]", ["[a:b:c:0.5]"] * 4),
        ("[a:b]", ["[a:b]"] * 4),
        ("[a|b:0.5]", ["[a|b:0.5]"] * 4),
        ("[(a:b:0.5]", ["[(a:b:0.5]"] * 4),
        ("[a):b:0.5]", ["[a):b:0.5]"] * 4),
        ("[a:b:0.5", ["[a:b:0.5"] * 4),
        ("a|b: c", ["a|b: c"] * 4),
        ("[a]", ["[a]"] * 4),
        ("", [""] * 4),
    ],
)
def test_schedules(text: str, by_step: list[str]) -> None:
    parsed = parse_schedule(text)
    assert [text_at(parsed, step, Stage(4)) for step in range(4)] == by_step


@pytest.mark.parametrize(
    ("when", "canvas"),
    [("0.5", "bbbb"), ("1.0", "bbbb"), ("8", "bbbb"), ("1.5", "aabb"), ("9", "abbb"), ("2.0", "aaaa"), ("20", "aaaa")],
)
def test_what_counts_in_the_canvas_after_a_guide_lies_above_one_or_beyond_its_steps(when: str, canvas: str) -> None:
    parsed = parse_schedule(f"[a:b:{when}]")
    stage = Stage(4, guide_steps=8)
    assert "".join(text_at(parsed, step, stage) for step in range(4)) == canvas


def test_what_changes_is_a_value() -> None:
    assert parse_schedule("a [b:c:0.5] [d|e]") == (
        "a ", Switch(("b",), ("c",), 0.5, True), " ", Turns((("d",), ("e",)))
    )  # fmt: skip


def test_prompts_joined_by_and() -> None:
    assert split_prompts("a cat :1.2 AND a dog AND a bird :-.5") == (
        ("a cat", 1.2),
        (" a dog ", 1.0),
        (" a bird", -0.5),
    )
    assert split_prompts("SAND AND\nANDY") == (("SAND ", 1.0), ("\nANDY", 1.0))
    assert split_prompts("a ratio of 16:9") == (("a ratio of 16:9", 1.0),)
    assert len(parse_prompt("a AND b").prompts) == 2
    assert parse_prompt("a AND b", splits=False).prompts[0].text == ("a AND b",)


def test_tags_are_handed_out_and_no_text() -> None:
    text, tags = cut_tags("a <lora:my style:0.8>cat <lyco:x:te=0.5:unet=1> <3 <token> a<b:c")
    assert text == "a cat  <3 <token> a<b:c"
    assert tags == (Tag("lora", ("my style", "0.8")), Tag("lyco", ("x", "te=0.5", "unet=1")))
    assert str(tags[0]) == "<lora:my style:0.8>"
    assert parse_prompt("a <lora:b:1> AND c").tags == (Tag("lora", ("b", "1")),)


_PIECES = [*"()[]:|\\<>. \n,-+01ab", "AND", "BREAK", "1.5", "<lora:a:1>", ":0.5]", ":1.3)", "é", "\0"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(_PIECES), max_size=25).map("".join), min_size=100, max_size=100))
def test_every_text_is_a_prompt(texts: list[str]) -> None:
    for text in texts:
        for part in parse_prompt(text).prompts:
            assert math.isfinite(part.factor)
            for step in range(3):
                sections = parse_emphasis(text_at(part.text, step, Stage(3)))
                assert all(sections) and all(math.isfinite(f.weight) for section in sections for f in section)


def test_ten_thousand_brackets_are_read_in_one_go() -> None:
    for mark in "([|:\\":
        text = 10_000 * mark
        assert text_at(parse_schedule(text), 0, Stage(1)) == text
        parse_emphasis(text)
    assert parse_emphasis("(" * 10_000 + "a")[0][-1].text.endswith("a")


def test_what_a_prompt_leaves_open_is_named() -> None:
    assert not list(unclosed(r"(a:1.2) [b] \( :) <lora:ink:0.8> <3 [a|b]"))
    assert list(unclosed("a <lora:ink:0.8 boat")) == ["'<lora:ink:0.8' has no > at its end, and is read as text"]
    (one,) = unclosed("a (red) (boat, " + "x" * 40)
    assert one.startswith("( is not closed and weighs all that follows, from '(boat, xxx")
    (two,) = unclosed("a ((red boat) [b")
    assert two.startswith("2 brackets are not closed and weigh all that follows, from '((red boat) [b' on; \\( is")
    assert not list(unclosed("((a", brackets=False))
    (cut,) = unclosed("(a boat AND the sea)")  # AND splits a prompt before its brackets are read
    assert cut.startswith("( is not closed and weighs all up to AND, from '(a boat' on")
    assert not list(unclosed("(a boat AND the sea)", splits=False))
    assert not list(unclosed("(a boat) :1.2 AND (the sea)"))
