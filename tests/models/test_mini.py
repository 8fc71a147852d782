"""The embedded model: a real checkpoint in diffusers' layout, and the art it was trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tiler import Budget, RenderRequest, render
from tiler.memory.process import read_rss
from tiler.models.clip import load_tokenizer
from tiler.models.family import read_family
from tiler.weights.checkpoint import resolve

FOLDER = resolve("mini").folder
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts/mini"))


def test_it_is_small_and_stored_in_fp16() -> None:
    files = list(FOLDER.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 20 * 2**20
    assert {t.dtype for f in files for t in load_file(f).values() if t.is_floating_point()} == {torch.float16}
    assert "Licence" in (FOLDER / "README.md").read_text()


def test_diffusers_loads_it_and_draws_the_same_picture(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        "mountains at sunset",
        num_inference_steps=4,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).images[0]
    request = RenderRequest(
        prompt="mountains at sunset",
        output=tmp_path / "x.png",
        width=256,
        height=256,
        num_inference_steps=4,
        guidance_scale=4.0,
        seed=5,
    )
    render(request, Budget(read_rss().now + 10**9))
    from PIL import Image

    got = np.asarray(Image.open(tmp_path / "x.png")).astype(float) / 255
    assert np.abs(got - want).max() <= 1.5 / 255


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_takes_any_text(text: str) -> None:
    ids = _tokenizer()(text).input_ids
    assert ids[0] == _tokenizer().bos_token_id
    assert all(0 <= i < len(_tokenizer()) for i in ids)
    # Nothing visible is lost: unknown words fall apart into known pieces.
    if text.strip().isascii() and any(c.isalnum() for c in text):
        assert len(ids) > 2


def _tokenizer(cache: list[object] = []):  # noqa: B006
    if not cache:
        cache.append(load_tokenizer(read_family(resolve("mini"))))
    return cache[0]


def test_scenes_are_deterministic_and_have_no_resolution() -> None:
    scenes = pytest.importorskip("scenes", exc_type=ImportError)
    for seed in range(6):
        scene = scenes.make(seed)
        small = scenes.render(scene, None, 64, 64).astype(float)
        assert np.array_equal(small, scenes.render(scenes.make(seed), None, 64, 64))
        large = scenes.render(scene, None, 512, 512).astype(float).reshape(64, 8, 64, 8, 3).mean(axis=(1, 3))
        assert np.abs(small - large).mean() <= 0.02 * 255
        crop = scenes.render(scene, scenes.View(0.25, 0.5, 0.5, 0.75), 128, 128).astype(float)
        whole = scenes.render(scene, None, 512, 512).astype(float)[256:384, 128:256]
        assert np.abs(crop - whole).mean() <= 0.01 * 255


def test_captions_say_what_is_there() -> None:
    pytest.importorskip("scenes", exc_type=ImportError)
    import captions
    import scenes

    for seed in range(30):
        scene = scenes.make(seed)
        text = captions.caption(scene, np.random.default_rng(seed), keep=1.0)
        assert any(words in text for words in captions.TERRAIN_WORDS[scene.terrain])
        assert any(words in text for words in captions.PALETTE_WORDS[scene.palette])
        body = ("no sun", "no moon") if scene.body == "none" else captions.BODY_WORDS[scene.body]
        assert any(words in text for words in body)
        assert scene.body == "none" or any(words in text for words in captions.SIDE_WORDS[scene.side])
        if scene.boat:
            assert scene.boat in text


def test_palettes_follow_the_prompt() -> None:
    """A smoke test of the weights: a generated picture's colours, in four bands, are nearest to a drawing of its palette."""
    pytest.importorskip("scenes", exc_type=ImportError)
    import captions
    import scenes

    def look(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(4, -1, *picture.shape[1:]).mean(axis=(1, 2)) / 255

    drawn = [(scene.palette, look(scenes.render(scene, None, 64, 64))) for scene in map(scenes.make, range(200))]

    def nearest(picture: np.ndarray) -> str:
        return min(drawn, key=lambda d: float(np.square(d[1] - look(picture)).sum()))[0]

    held_out = [scenes.make(10_000_000 + k) for k in range(40)]
    assert sum(nearest(scenes.render(s, None, 64, 64)) == s.palette for s in held_out) >= 38

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = [name for name in scenes.PALETTES for _ in range(2)]
    prompts = [f"{('hills', 'sea')[k % 2]} {captions.PALETTE_WORDS[name][0]}" for k, name in enumerate(asked)]
    generators = [torch.Generator().manual_seed(k) for k in range(16)]
    made = pipe(prompts, num_inference_steps=8, guidance_scale=4.0, generator=generators, output_type="np").images
    right = [nearest((255 * picture).astype(np.uint8)) == name for picture, name in zip(made, asked, strict=True)]
    assert sum(right) >= 13, list(zip(prompts, right, strict=True))
