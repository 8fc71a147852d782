"""The embedded model: a real checkpoint in diffusers layout with its own defaults, the art it was trained on, and
training that continues from the committed weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import tiler
from tiler import Budget, RenderRequest, render
from tiler.memory.process import read_rss
from tiler.models.clip import load_tokenizer
from tiler.models.family import read_family
from tiler.models.own_defaults import read_defaults
from tiler.planning.resolve import resolve as resolve_request
from tiler.request import Layout, Scheduler
from tiler.weights.checkpoint import resolve

FOLDER = resolve("mini").folder
sys.path.insert(0, str(Path(tiler.__file__).parents[1] / "scripts/mini"))

import art  # noqa: E402
import captions  # noqa: E402
import judges  # noqa: E402
from pool import Pool, choose_view, shares_of  # noqa: E402


def test_it_is_small_and_stored_in_fp16() -> None:
    files = list(FOLDER.rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) <= 20 * 2**20
    assert {t.dtype for f in files for t in load_file(f).values() if t.is_floating_point()} == {torch.float16}
    assert "Licence" in (FOLDER / "README.md").read_text()


def test_diffusers_loads_it_and_draws_the_same_picture(tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config
    )  # the model's own adds noise, each program its own
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
        guidance_interval=(0.0, 1.0),
        scheduler=Scheduler.EULER,
        seed=5,
    )
    render(request, Budget(read_rss().now + 10**9))
    got = np.asarray(Image.open(tmp_path / "x.png")).astype(float) / 255
    assert np.abs(got - want).max() <= 1.5 / 255


@settings(max_examples=40, deadline=None)
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


def test_without_a_prompt_it_draws_one_of_its_scenes_under_its_ceiling(tmp_path: Path) -> None:
    """Like the README's first command: the seed chooses a prompt; guidance and strength are the model's own."""
    out, report = tmp_path / "canvas.png", tmp_path / "canvas.json"
    command = [sys.executable, "-m", "tiler", "render", "--seed", "7", "--size", "288", "--steps", "4", "-q"]
    subprocess.run([*command, "--max-ram", "420MB", "-o", str(out), "--report", str(report)], check=True)
    assert json.loads(report.read_text())["peak_rss_bytes"] <= 420_000_000
    filled = resolve_request(RenderRequest(seed=7), read_family(resolve("mini")))
    assert (filled.guidance_scale, filled.strength, filled.num_inference_steps) == (2.0, 0.35, 20)
    assert filled.layout is Layout.JITTER
    assert filled.prompt == "misty mountains in black ink, a small sun on the right, sumi-e"
    red, _, blue = np.asarray(Image.open(out).resize((36, 36), Image.Resampling.BOX), float).transpose(2, 0, 1)
    redness = red - blue
    y, x = np.unravel_index(redness.argmax(), redness.shape)
    assert redness[y, x] > 80 and y < 18 and x > 20, "a sun at the upper right"
    assert np.median(redness) < 30, "nothing else has a colour"


def test_its_prompts_are_words_of_its_captions() -> None:
    """A word that occurs in no caption would have no effect."""
    known = {
        w for words in (captions.PALETTE_WORDS, captions.TERRAIN_WORDS, captions.STYLE_WORDS) for w in words.values()
    }
    phrases = [*(phrase for words in known for phrase in words), *captions.NO_BODY_WORDS]
    phrases += [phrase for words in captions.OBJECT_WORDS.values() for phrase in words]
    bodies = [phrase for words in captions.BODY_WORDS.values() for phrase in words]
    phrases += [f"{body} {side}" for body in bodies for sides in captions.SIDE_WORDS.values() for side in sides]
    for prompt in read_defaults(FOLDER)["prompt"]:
        rest = prompt
        for phrase in sorted(phrases, key=len, reverse=True):
            rest = rest.replace(phrase, "")
        assert not rest.strip(" ,"), prompt


# --- art -------------------------------------------------------------------------------------------------------------


def scenes_of_every_terrain() -> list[art.Scene]:
    """Two scenes of each terrain."""
    found: dict[art.Terrain, list[art.Scene]] = {terrain: [] for terrain in art.Terrain}
    for seed in range(400):
        scene = art.compose(seed)
        if len(found[scene.terrain]) < 2:
            found[scene.terrain].append(scene)
    scenes = [scene for pair in found.values() for scene in pair]
    assert len(scenes) == 2 * len(art.Terrain)
    return scenes


SCENES = scenes_of_every_terrain()


def shrunk(pixels: np.ndarray, by: int) -> np.ndarray:
    height, width, _ = pixels.shape
    return pixels.reshape(height // by, by, width // by, by, 3).astype(float).mean(axis=(1, 3))


@pytest.mark.parametrize("scene", SCENES, ids=lambda s: f"{s.terrain} {s.seed}")
def test_a_scene_has_no_resolution(scene: art.Scene) -> None:
    """Drawn twice as large, eight times as large, or in parts, a scene is the same picture. Fine waves and clouds shift
    the mean colour a little if a style cuts them into flat tones."""
    small = art.draw(scene, None, 64, 64).pixels
    for by, most in ((2, 0.02), (8, 0.035)):
        large = art.draw(scene, None, 64 * by, 64 * by).pixels
        assert np.abs(shrunk(large, by) - small).mean() <= most * 255
    view = art.View(x0=0.25, y0=0.5, x1=0.5, y1=0.75)
    part = art.draw(scene, view, 128, 128).pixels.astype(float)
    assert np.abs(part - large[256:384, 128:256]).mean() <= 0.01 * 255


def test_a_closer_view_shows_more_than_an_enlarged_one() -> None:
    """An enlargement has no detail between its pixels; a drawing has ridges, trees and waves there."""
    gained = []
    for scene in SCENES:
        view = art.View(x0=0.3, y0=0.5, x1=0.55, y1=0.75)
        near, far = (art.draw(scene, view, side, side).pixels for side in (256, 32))
        enlarged = np.asarray(Image.fromarray(far).resize((256, 256), Image.Resampling.LANCZOS))
        gained.append(edges(near) / edges(enlarged))
    assert np.median(gained) > 1.3


def edges(pixels: np.ndarray) -> float:
    return float(np.square(np.diff(pixels.astype(float), axis=0)).mean() ** 0.5)


def test_a_seed_is_a_scene() -> None:
    for scene in SCENES:
        assert art.compose(scene.seed) == scene
        first, again = (art.draw(scene, None, 64, 64) for _ in range(2))
        assert np.array_equal(first.pixels, again.pixels)
        assert np.array_equal(first.things, again.things)
    pictures = {art.draw(scene, None, 32, 32).pixels.tobytes() for scene in SCENES}
    assert len(pictures) == len(SCENES)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 3.0])
def test_one_disc_at_most_and_on_its_side(aspect: float) -> None:
    """Measured in the pixels: one patch, on the side that the scene names, not shredded by clouds."""
    seen = 0
    for seed in range(40):
        scene = art.compose(seed, aspect)
        width = round(128 * aspect)
        shown = art.draw(scene, None, width, 128).things == art.Thing.BODY.number
        assert len(scene.discs) == (scene.body is not art.Body.NONE)
        if not scene.discs:
            assert not shown.any()
            continue
        if shown.sum() < 12:  # behind mountains
            continue
        seen += 1
        x = np.nonzero(shown)[1].mean() / width
        assert {art.Side.LEFT: x < 0.4, art.Side.CENTRE: 0.4 < x < 0.6, art.Side.RIGHT: x > 0.6}[scene.side]
        radius = scene.discs[0].radius * 128
        rows, columns = np.nonzero(shown)
        assert max(np.ptp(rows), np.ptp(columns)) <= 2 * radius + 2
    assert seen > 15


def test_captions_say_what_is_there() -> None:
    for seed in range(60):
        scene = captions.as_seen(art.compose(seed), shares_of(art.draw(art.compose(seed), None, 128, 128).things))
        text = captions.caption(scene, np.random.default_rng(seed), keep=1.0)
        assert any(words in text for words in captions.TERRAIN_WORDS[scene.terrain])
        assert any(words in text for words in captions.PALETTE_WORDS[scene.palette_name])
        body = captions.NO_BODY_WORDS if scene.body is art.Body.NONE else captions.BODY_WORDS[scene.body]
        assert any(words in text for words in body)
        if scene.body is not art.Body.NONE:
            assert any(words in text for words in captions.SIDE_WORDS[scene.side])
        for thing in captions.Object:
            if captions.has(scene, thing) and not (thing == "pines" and scene.terrain is art.Terrain.FOREST):
                assert any(words in text for words in captions.OBJECT_WORDS[thing])


def test_a_crops_caption_leaves_out_what_it_does_not_show() -> None:
    """Otherwise a tile whose prompt names a sun outside the tile would learn to draw a second one."""
    rng, told = np.random.default_rng(0), 0
    bodies = [words for each in captions.BODY_WORDS.values() for words in each]
    for seed in range(80):
        scene = art.compose(seed)
        shown = art.draw(scene, choose_view(rng, scene), 64, 64).things
        text = captions.caption(scene, rng, 1.0, shares_of(shown))
        named = any(words in text for words in bodies)
        assert named == bool((shown == art.Thing.BODY.number).mean() > 0.02)
        told += named
        if not (shown == art.Thing.BOAT.number).any():
            assert not any(words in text for words in captions.OBJECT_WORDS[captions.Object.BOAT])
    assert told >= 3


def test_crops_often_show_the_edge_of_a_disc_and_pictures_have_other_shapes() -> None:
    """As the tiles of a large canvas and the guide of a banner do."""
    rng, edges_seen, discs = np.random.default_rng(1), 0, 0
    for seed in range(60):
        scene = art.compose(seed)
        view = choose_view(rng, scene)
        assert 0 <= view.x0 < view.x1 <= scene.aspect + 1e-9 and 0 <= view.y0 < view.y1 <= 1 + 1e-9
        assert view.x1 - view.x0 == pytest.approx(view.y1 - view.y0)
        if scene.discs:
            discs += 1
            edges_seen += 0.02 < (art.draw(scene, view, 32, 32).things == art.Thing.BODY.number).mean() < 0.98
    assert edges_seen >= 0.3 * discs
    pool = Pool(folder=Path("nowhere"), part=2)
    shapes = {pool.shape(shard) for shard in range(15)}
    assert len(shapes) == 6 and all(h % 32 == w % 32 == 0 for h, w in shapes)
    assert pool.shape(2) != (256, 256) and pool.scene(2, 3).aspect == pool.shape(2)[1] / pool.shape(2)[0]
    assert (pool.whole(0), pool.whole(2)) == (2, 4)


# --- judges ----------------------------------------------------------------------------------------------------------


def test_a_seam_stands_out_from_lines_beside_it() -> None:
    from posters import find_seams

    rng = np.random.default_rng(0)
    picture = np.full((512, 512, 3), 100.0) + rng.normal(0, 2, (512, 512, 1))
    lines = {128, 256, 384}
    plain = find_seams(picture, lines, lines)
    assert plain.elsewhere[0] <= plain.borders <= plain.elsewhere[1]
    picture[:, 128:256] += 4
    picture[:, 384:] -= 4
    torn = find_seams(picture, lines, lines)
    assert torn.borders > torn.elsewhere[1] > torn.elsewhere[0]


@pytest.mark.parametrize("stretched", [1.0, 1.5, 3.0])
def test_roundness_of_ellipses(stretched: float) -> None:
    """An ellipse of axes r·√s and r/√s has 4/π·arctan(1/√s) of its area within the circle of the same area."""
    from roundness import find_disc, roundness

    rows, columns = np.mgrid[:256, :256]
    ellipse = (rows - 90) ** 2 * stretched + (columns - 130) ** 2 / stretched < 40**2
    picture = np.full((256, 256, 3), (40, 80, 160), np.uint8)
    picture[ellipse] = 250, 240, 200
    picture[10:14, 10:14] = 250, 240, 200  # a star is not part of it
    found = find_disc(picture, np.array([250, 240, 200]))
    assert (found == ellipse).all()
    shared = 4 / np.pi * np.arctan(1 / np.sqrt(stretched))
    assert roundness(found) == pytest.approx(shared / (2 - shared), abs=0.015)


def test_suns_that_set_or_run_into_clouds_have_no_roundness() -> None:
    from roundness import disc_roundness, scenes_of_big_suns

    ((scene, drawing),) = scenes_of_big_suns(1)
    assert disc_roundness(drawing.pixels, scene, drawing) == pytest.approx(1, abs=0.03)
    colour = drawing.pixels[drawing.things == art.Thing.BODY.number].mean(axis=0)
    for changed in slice(0, int(256 * scene.discs[0].y)), slice(int(256 * scene.discs[0].y), 256):
        picture = drawing.pixels.copy()
        picture[changed] = colour if changed.start else 255 - colour
        assert disc_roundness(picture, scene, drawing) is None


def test_posters_name_the_canvases_with_a_second_disc(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from posters import Poster, Seams

    discs = iter([1, 2, 0])
    grey = np.full((40, 60, 3), 128, np.uint8)
    monkeypatch.setattr(judges, "trained_classifier", lambda *_: None)
    monkeypatch.setattr(judges, "judge_poster", lambda *_: Poster(grey, Seams(1.0, (0.9, 1.1)), 1.0, next(discs)))
    judges.posters(settings_of(tmp_path, count=3))
    assert capsys.readouterr().out.endswith("second discs in 1 of 3: [1]\n")
    assert Image.open(tmp_path / "sheet.png").size == (2 * 512, 2 * 512)


def test_refining_is_judged_against_the_drawing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A render that only enlarged its guide would have Lanczos's spectrum: less than the drawing's where it is fine."""
    import refinement

    def enlarged(model: Path, prompt: str, width: int, height: int, seed: int, **asked: object) -> np.ndarray:
        assert asked["strength"] == 0.5
        guide = Image.open(str(asked["guide_image"]))
        return np.asarray(guide.resize((width, height), Image.Resampling.LANCZOS))

    monkeypatch.setattr(refinement, "rendered", enlarged)
    judges.refine(settings_of(tmp_path, count=1))
    _, seams, _, *octaves = capsys.readouterr().out.splitlines()
    assert "seams" in seams
    loss = {float(w): (float(a), float(b)) for w, a, _, b, _ in (line.replace(":", "").split() for line in octaves)}
    assert all(refined == lanczos for refined, lanczos in loss.values())
    assert loss[2.0][0] < -3 < loss[32.0][0] < 3
    assert Image.open(tmp_path / "sheet.png").size == (1024, 512), "the refined one and the drawing"


def test_generated_pictures_are_guided_as_long_as_rendered_ones() -> None:
    """Guidance doubles a step's samples: in 15 of 20 steps for 0–0.75 of the schedule."""
    import pictures

    pipe = pictures.load_pipeline(FOLDER)
    samples = []
    pipe.unet.register_forward_pre_hook(lambda _, args: samples.append(len(args[0])))
    for seed in range(2):  # the pipeline keeps nothing from the picture before
        made = pictures.generate(pipe, ["mountains at dawn"], [seed])
        assert made.shape == (1, 256, 256, 3)
    assert samples == 2 * (15 * [2] + 5 * [1])


def test_the_classifier_learns_from_each_drawing_several_times() -> None:
    """A third of a batch is new; the rest are earlier drawings with their own labels."""
    from classifier import _PART, _batches

    seen: dict[bytes, tuple[int, int]] = {}
    batches = _batches(np.random.default_rng(0))
    for number in range(3):
        drawn, want = next(batches)
        for k, picture in enumerate(drawn):
            what = int(want["palette"][k]), int(want["terrain"][k])
            assert seen.setdefault(picture.numpy().tobytes(), what) == what
        assert len(drawn) == 3 * _PART and len(seen) == (number + 1) * _PART


def test_a_texture_of_other_places_is_nearer_than_none() -> None:
    """By its spectrum; by its pixels, none is nearer."""
    from spectrum import spectral_error

    rng = np.random.default_rng(0)
    texture, other = (torch.from_numpy(rng.normal(0, 0.1, (1, 3, 64, 64))).float() for _ in range(2))
    assert spectral_error(texture, texture) == 0
    assert spectral_error(other, texture) < 0.6 * spectral_error(torch.zeros_like(texture), texture)
    assert (other - texture).square().mean() > texture.square().mean()


def settings_of(folder: Path, count: int) -> judges.Settings:
    from workshop import Workshop

    return judges.Settings(
        model=FOLDER,
        workshop=Workshop(work=folder),
        steps=1,
        count=count,
        width=512,
        height=512,
        strength=0.5,
        seed=0,
        out=folder / "sheet.png",
    )


# --- weights ---------------------------------------------------------------------------------------------------------


def test_palettes_follow_the_prompt() -> None:
    """A smoke test of the weights: in four bands, the colours of a generated picture are nearest to its own palette."""

    def bands(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(4, -1, *picture.shape[1:]).mean(axis=(1, 2)) / 255

    drawn = [(s.palette_name, bands(art.draw(s, None, 32, 32).pixels)) for s in map(art.compose, range(400))]

    def nearest(picture: np.ndarray) -> str:
        order = sorted(drawn, key=lambda d: float(np.square(d[1] - bands(picture)).sum()))
        names = [name for name, _ in order[:5]]
        return max(names, key=names.count)

    held_out = [art.compose(10_000_000 + k) for k in range(60)]
    assert sum(nearest(art.draw(s, None, 32, 32).pixels) == s.palette_name for s in held_out) >= 48

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    asked = list(art.PALETTES)[::3]
    prompts = [f"misty mountains {captions.PALETTE_WORDS[name][0]}" for name in asked]
    generators = [torch.Generator().manual_seed(k) for k in range(len(asked))]
    made = pipe(prompts, num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="np").images
    right = [nearest((255 * picture).astype(np.uint8)) == name for picture, name in zip(made, asked, strict=True)]
    assert sum(right) >= len(asked) - 1, list(zip(prompts, right, strict=True))


@pytest.mark.parametrize(("steps", "smooth"), [(0, 0.0), (3, 0.5)])  # of the whole autoencoder before
def test_the_decoder_is_trained_alone(tmp_path: Path, steps: int, smooth: float) -> None:
    """A UNet that knows the encoder's latents can go on."""
    import stages
    from train_vae import VaeSettings, train_vae
    from workshop import Workshop, fingerprint

    workshop = Workshop(work=tmp_path, part=2)
    stages.draw(workshop, 1)
    for _ in range(steps):
        train_vae(workshop, VaeSettings(minutes=0, batch=2))
    before = workshop.vae()
    train_vae(workshop, VaeSettings(minutes=0, batch=2, decoder=True, smooth=smooth))
    after = workshop.vae()
    assert fingerprint(after) == fingerprint(before)
    moved = [
        not torch.equal(p, q) for p, q in zip(before.decoder.parameters(), after.decoder.parameters(), strict=True)
    ]
    assert np.mean(moved) > 0.9  # the first step is too small for a few large weights


def test_discs_count_more_where_noise_shows_them() -> None:
    """Where it hides them, the loss is least for the mean of what may be there, which weights would distort."""
    from art import Thing
    from examples import Batch
    from labels import labels
    from train_unet import Training, UnetSettings
    from workshop import shipped_tokenizer

    layout = torch.zeros(2, 4, 4, dtype=torch.int64)
    layout[0, 0, 0] = Thing.BODY.number
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 2, 8, 8, 8, generator=generator)
    ids = torch.tensor(shipped_tokenizer()(["a sun", "no sun"], padding="max_length").input_ids)
    few, many = (Training(UnetSettings(minutes=0, focus=focus), shipped_tokenizer()) for focus in (1.0, 9.0))
    for t, same in (999, True), (100, False):
        batch = Batch(
            latents=latents, noise=noise, timesteps=torch.full((2,), t), ids=ids, layout=layout,
            labels=labels([art.compose(1), art.compose(2)]), told=torch.ones(2, dtype=torch.bool),
        )  # fmt: skip
        with torch.no_grad():
            lightly, heavily = (training._losses(batch)[1].item() for training in (few, many))
        assert (lightly == pytest.approx(heavily, rel=1e-4)) is same, t


def test_several_processes_draw_what_one_draws(tmp_path: Path) -> None:
    from workshop import Workshop

    script = Path(tiler.__file__).parents[1] / "scripts/mini/train.py"
    options = ["--part", "1", "--shards", "1", "--processes", "2", "--work", tmp_path / "several"]
    subprocess.run([sys.executable, script, "draw", *options], check=True, timeout=120)
    several, one = Workshop(work=tmp_path / "several", part=1).pool, Workshop(work=tmp_path / "one", part=1).pool
    for shard in (0, 900):
        one.draw(shard)
        assert np.array_equal(several.pictures(shard), one.pictures(shard))


def test_only_counted_pictures_have_a_loss() -> None:
    from labels import ATTRIBUTES, attribute_loss

    generator = torch.Generator().manual_seed(1)
    got = {name: torch.randn(5, classes, generator=generator) for name, classes in ATTRIBUTES.items()}
    want = {
        name: torch.rand(5, classes, generator=generator).round()
        if name == "objects"
        else torch.randint(classes, (5,), generator=generator)
        for name, classes in ATTRIBUTES.items()
    }
    some = torch.tensor([True, False, True, True, False])
    alone = attribute_loss({n: v[some] for n, v in got.items()}, {n: v[some] for n, v in want.items()})
    assert attribute_loss(got, want, some).item() == pytest.approx(alone.item(), rel=1e-5)
    assert attribute_loss(got, want, torch.zeros(5, dtype=torch.bool)).item() == 0


def test_a_pool_may_grow_while_a_unet_learns_from_it(tmp_path: Path) -> None:
    import stages
    from examples import Sampler, Supply
    from workshop import Workshop

    workshop = Workshop(work=tmp_path, part=2)
    stages.draw(workshop, 2)
    sampler, supply = Sampler(workshop.tokenizer(), crops=0.5, seed=1), Supply(workshop, workshop.vae(), seed=1)
    try:
        sampler.add(supply.new(wait=True))
        assert sampler.count == 8 and not supply.new(wait=True)
        stages.draw(workshop, 3)  # the last has another shape
        sampler.add(supply.new(wait=True))
    finally:
        supply.close()
    assert sampler.count == 12
    batches = [sampler.batch(3) for _ in range(20)]
    assert {tuple(batch.latents.shape[2:]) for batch in batches} == {(32, 32), (20, 56)}
    assert all(len(tensor) == 3 for batch in batches for tensor in batch.tensors())


def test_training_goes_on_from_the_committed_weights_and_exports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of each stage on a pool of a few drawings; nothing outside the repository is needed."""
    import stages
    import train_unet as training
    from train_unet import UnetSettings, train_unet
    from train_vae import VaeSettings, train_vae
    from workshop import Workshop

    monkeypatch.setattr(training, "HELD_OUT_TIMESTEPS", (500,))
    workshop, out = Workshop(work=tmp_path / "work", part=2), tmp_path / "model"
    stages.draw(workshop, 3)  # the last has another shape
    train_vae(workshop, VaeSettings(minutes=0, batch=2))
    for step in range(2):
        train_unet(workshop, UnetSettings(minutes=0, batch=2))
        assert f"unet step {step}, 12 pictures" in capsys.readouterr().out
    stages.export(workshop, out)
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(folder / f"{name}.safetensors") for folder in (FOLDER, out))
        assert before.keys() == after.keys()
        moved = max(float((before[k] - after[k]).abs().max()) for k in before if before[k].is_floating_point())
        assert 0 < moved < 0.01, "neither random weights nor the committed ones"
    for config in (
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
    ):
        assert json.loads((out / config).read_text()) == json.loads((FOLDER / config).read_text())
    assert sum(f.stat().st_size for f in out.rglob("*.safetensors")) <= 20 * 2**20
    assert read_family(resolve(str(out))).traits == read_family(resolve("mini")).traits
