"""LoRA tags in prompts, and --lora."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiler.errors import UsageError
from tiler.request.loras import Lora, parse_lora, parse_tag
from tiler.request.prompt import cut_tags


@pytest.mark.parametrize(
    ("tag", "strength", "text_strength"),
    [
        ("<lora:a>", 1, 1), ("<lora:a:-0.5>", -0.5, -0.5), ("<lyco:a:0.5:0.8>", 0.8, 0.5), ("<lora:a:unet=0.3>", 0.3, 1),
        ("<lora:a:te=0.5>", 0.5, 0.5), ("<lora:a:unet=0.8:te=0.5>", 0.8, 0.5), ("<lora:a:0.5:unet=0.8>", 0.8, 0.5),
    ],
)  # fmt: skip
def test_tags_say_two_strengths_as_in_a1111(tag: str, strength: float, text_strength: float) -> None:
    rest, (cut,) = cut_tags(f"a boat{tag}")
    assert (rest, parse_tag(cut)) == ("a boat", ("a", strength, text_strength))


def test_strengths_are_numbers(tmp_path: Path) -> None:
    assert parse_lora("a=b.safetensors=0.5:-1") == Lora(file=Path("a=b.safetensors"), strength=0.5, text_strength=-1)
    (tmp_path / "x=1").touch()
    assert parse_lora(f"{tmp_path}/x=1") == Lora(file=tmp_path / "x=1")
    with pytest.raises(UsageError, match="the strength 'much' is not a number"):
        parse_lora("x.safetensors=much")
