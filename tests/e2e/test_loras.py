"""Complete renders with LoRAs, against diffusers' pipeline with weights changed by a closed formula."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from tests.models.loras import as_kohya, fuse, kohya, layers_of, random_lora, save
from tests.models.rendering import ask, rendered
from tiler import Budget, events, render
from tiler.cli.repeat import repeat
from tiler.errors import BudgetExceeded, JobError, ModelError, UsageError
from tiler.memory.process import read_rss
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.loras import apply_loras, find_loras, notes_on_loras
from tiler.models.reading import ReadAs
from tiler.pipeline import encode
from tiler.planning import fit
from tiler.planning import render as planner
from tiler.planning.resolve import resolve
from tiler.request import EncodeRequest, Lora, Precision, Scheduler
from tiler.weights.lora_files import find_lora


class Made:
    """A pipeline, and a LoRA file with kohya's names for its UNet and its text encoder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.pipe = StableDiffusionPipeline.from_pretrained(
            model, variant="fp16", torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
        )
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = random_lora(self.pipe.unet, layers_of(self.pipe.unet))
        self.text = random_lora(self.pipe.text_encoder, layers_of(self.pipe.text_encoder), seed=1)
        text = {f"text_model.{path.removeprefix('text_model.')}": pair for path, pair in self.text.items()}
        self.file = save(
            folder / "foo.safetensors", as_kohya("lora_unet", self.unet, 2.0) | as_kohya("lora_te", text, 2.0)
        )

    def latents(self, unet: float, text: float) -> Tensor:
        """The pipeline's latents at these strengths; alpha is 2, the rank 3."""
        fuse(self.pipe.unet, self.unet, unet * 2 / 3)
        fuse(self.pipe.text_encoder, self.text, text * 2 / 3)
        settings = {"num_inference_steps": 2, "guidance_scale": 6.0, "width": 64, "height": 64}
        got: Tensor = self.pipe(
            "a boat", generator=torch.Generator().manual_seed(5), output_type="latent", **settings
        ).images
        return got


@pytest.fixture
def made(tiny: Path, tmp_path: Path) -> Made:
    (tmp_path / "loras").mkdir()
    return Made(tiny, tmp_path / "loras")


def boat(made: Made, folder: Path, **values: Any) -> Tensor:
    defaults = {
        "width": 64, "height": 64, "guidance_scale": 6.0, "scheduler": Scheduler.DDIM, "num_inference_steps": 2
    }  # fmt: skip
    latents, _ = rendered(ask(made.model, folder, **(defaults | values)))
    return latents


def test_a_tag_is_what_the_pipeline_gives_with_the_lora_fused(made: Made, tmp_path: Path) -> None:
    plain = made.latents(0, 0)
    got = boat(made, tmp_path, prompt="a boat<lora:foo:0.8>", lora_dir=tmp_path / "loras")
    want = made.latents(0.8, 0.8)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (plain - want).abs().max() > 0.05 * want.abs().max()  # it is felt
    image: Any = Image.open(tmp_path / "x.png")
    assert image.text["parameters"].startswith("a boat<lora:foo:0.8>\n")
    assert 'Lora hashes: "foo: ' in image.text["parameters"]
    assert list(json.loads(image.text["tiler"])["lora_hashes"]) == ["foo"]


def test_text_encoders_have_a_strength_of_their_own(made: Made, tmp_path: Path) -> None:
    got = boat(made, tmp_path, loras=(f"{made.file}=0.5:1.5",))
    want = made.latents(0.5, 1.5)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_strength_0_changes_no_byte(made: Made, tmp_path: Path, precision: Precision) -> None:
    values = {"precision": precision, "cache_dir": tmp_path / "packed", "num_inference_steps": 1}
    plain = boat(made, tmp_path, **values)
    assert torch.equal(boat(made, tmp_path, loras=(f"{made.file}=0",), **values), plain)
    if precision is Precision.FP32:  # nor does what its name says
        fast = shutil.copy(made.file, tmp_path / "lcm-lora.safetensors")
        assert torch.equal(boat(made, tmp_path, loras=(f"{fast}=0",), **values), plain)
    if precision is Precision.INT8:
        assert not torch.equal(boat(made, tmp_path, loras=(f"{made.file}=-0.5",), **values), plain)
        assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 1  # for all strengths


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_same_seed_same_bytes_whatever_the_plan(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """One sample at a time with streamed weights, or sixteen with weights that stay in memory."""
    values = {
        "width": 72, "loras": (str(made.file),), "precision": precision, "cache_dir": tmp_path / "packed",
        "num_inference_steps": 1,
    }  # fmt: skip
    monkeypatch.setattr(planner, "MAX_BATCH", 1)
    monkeypatch.setattr(fit, "_choose_resident", lambda *args: {})
    one = boat(made, tmp_path, **values)
    monkeypatch.undo()
    assert torch.equal(boat(made, tmp_path, **values), one)


def test_beside_int8_weights_a_lora_does_what_it_does_in_fp32(made: Made, tmp_path: Path) -> None:
    """Its factors are rounded like the weights. LoHa and its kin are packed with the weights."""
    torch.manual_seed(2)
    hada = {}
    for path in layers_of(made.pipe.unet, every=2):
        weight: Any = made.pipe.unet.get_submodule(path).weight
        out, row, name = len(weight), weight[0].numel(), kohya("lora_unet", path)
        hada |= {
            f"{name}.hada_w1_a": 0.1 * weight.std().item() * torch.randn(out, 2),
            f"{name}.hada_w1_b": torch.randn(2, row),
        }
        hada |= {f"{name}.hada_w2_a": torch.randn(out, 2), f"{name}.hada_w2_b": torch.randn(2, row)}
    loha = save(tmp_path / "loha.safetensors", hada)
    got = {}
    for precision in (Precision.FP32, Precision.INT8):
        values = {"precision": precision, "cache_dir": tmp_path / "packed", "num_inference_steps": 1}
        plain = boat(made, tmp_path, **values)
        got[precision] = boat(made, tmp_path, loras=(str(loha), str(made.file)), **values) - plain
    assert (got[Precision.INT8] - got[Precision.FP32]).norm() < 0.4 * got[Precision.FP32].norm()
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 2


def test_an_lcm_lora_brings_its_few_steps(made: Made, tmp_path: Path) -> None:
    file = made.file.rename(made.file.with_name("lcm-lora-sdv1-5.safetensors"))
    said: list[str] = []
    request = replace(ask(made.model, tmp_path, width=64, height=64, loras=(str(file),)), num_inference_steps=None)
    rendered(request, said)
    assert (
        "lcm-lora-sdv1-5.safetensors is for few steps (LCM): 4 steps, guidance 1, LCM; what is given as an option wins"
        in said
    )
    settings = json.loads(Image.open(tmp_path / "x.png").text["tiler"])  # type: ignore[attr-defined]
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["scheduler"]) == (4, 1.0, "LCM")
    models = Models(families.open_family(request))
    found = find_loras(request)
    models.loras = apply_loras(found, models)
    asked = resolve(replace(request, guidance_scale=7.5), models.family, found)
    assert list(notes_on_loras(asked, models, ReadAs()))[-1].startswith(
        "guidance 7.5 is too high for this kind of LoRA"
    )


def test_the_command_line_takes_loras(
    in_process: Any, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("render", "--model", made.model, "--size", 64, "--steps", 1, "-s", 5, "--no-guide", "--quiet", "-o")
    twice = ("--lora", f"{made.file}=0.3", "--lora", "foo=0.4", "--lora-dir", made.file.parent)
    given = in_process(*common, "b.png", "a boat ", *twice)
    assert given.code == 0, given.err
    request = ask(
        made.model, tmp_path, prompt="a boat <lora:foo:0.7>", lora_dir=made.file.parent, num_inference_steps=1,
        width=64, height=64,
    )  # fmt: skip
    looked = list[tuple[Any, ...]]()
    monkeypatch.setattr("tiler.models.loras.find_lora", lambda *given: looked.append(given) or find_lora(*given))
    rendered(request)
    assert len(looked) == 1  # a render looks its LoRAs up once
    pictures = [Image.open(tmp_path / name).tobytes() for name in ("x.png", "b.png")]
    assert pictures[0] == pictures[1]  # a file that is named twice adds up
    again = partial(repeat, tmp_path / "b.png", frozenset({"model"}), {"loras": (), "prompt": None})
    with pytest.raises(ModelError, match="made with the LoRA foo, which is neither beside it"):
        again()
    monkeypatch.setenv("TILER_LORA_DIRS", str(made.file.parent))
    found = [Lora(file=made.file, strength=strength, text_strength=strength) for strength in (0.3, 0.4)]
    assert again().values["loras"] == tuple(found)
    assert not any("LoRA" in note for note in again().notes)
    save(made.file, as_kohya("lora_unet", random_lora(made.pipe.unet, layers_of(made.pipe.unet)), 1.0))
    assert any(
        note.startswith("the picture was made with another file of the LoRA foo: its hash was ")
        for note in again().notes
    )


def test_a_job_goes_on_with_the_same_lora_only(made: Made, tmp_path: Path) -> None:
    def stop(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.name == "decode":
            raise BudgetExceeded()

    request = ask(made.model, tmp_path, prompt="a boat<lora:foo>", lora_dir=made.file.parent, width=64, height=64)
    with pytest.raises(BudgetExceeded):
        render(request, Budget(read_rss().now + 10**9), stop)
    before = made.file.read_bytes()
    save(made.file, as_kohya("lora_unet", made.unet, 2.0))
    with pytest.raises(JobError, match=r'--lora was \[{"name": "foo", '):
        rendered(request)
    made.file.write_bytes(before)
    moved = made.file.parent.rename(tmp_path / "moved")
    said: list[str] = []
    rendered(replace(request, lora_dir=moved), said)
    assert any(note.startswith("continuing at") for note in said)


def test_tags_that_cannot_be_followed(made: Made, tmp_path: Path) -> None:
    (made.file.parent / "sub").mkdir()
    shutil.copy(made.file, made.file.parent / "sub" / "twice.safetensors")
    shutil.copy(made.file, made.file.parent / "twice.safetensors")
    for tag, kind, says in (
        ("<lora:fo:1>", ModelError, "no LoRA in .* is called .fo.; near names are foo"),
        ("<lora:foo:much>", UsageError, "'much' is not a number"),
        ("<lora:foo:1:lbw=MIDD>", UsageError, "'lbw=MIDD' cannot be applied"),
        ("<lora:twice:1>", UsageError, "is in two files"),
        ("<hypernet:foo:1>", UsageError, "does not know this kind of tag"),
    ):  # fmt: skip
        with pytest.raises(kind, match=says):
            boat(made, tmp_path, prompt=f"a boat {tag}", lora_dir=made.file.parent)
    with pytest.raises(UsageError, match="same strength in both prompts"):
        boat(made, tmp_path, prompt="a <lora:foo:1>", canvas_prompt="<lora:foo:0.5>", lora_dir=made.file.parent)
    with pytest.raises(UsageError, match="two LoRAs are called twice"):
        boat(made, tmp_path, loras=tuple(map(str, made.file.parent.rglob("twice.safetensors"))))
    with pytest.raises(UsageError, match="--lora-dir"):
        boat(made, tmp_path, prompt="a boat <lora:foo:1>")


def test_encoded_prompts_are_those_of_their_lora(made: Made, tmp_path: Path) -> None:
    """In the cache and in the file of `tiler encode`."""
    lora = f"{made.file}=0:1.5"
    values = {"cache_dir": tmp_path / "cache", "num_inference_steps": 1}
    plain, changed = boat(made, tmp_path, **values), boat(made, tmp_path, loras=(lora,), **values)
    assert not torch.equal(changed, plain)
    assert torch.equal(boat(made, tmp_path, **values), plain)
    words = tmp_path / "words.safetensors"
    encode(
        EncodeRequest(prompts=("a boat",), model=str(made.model), loras=(lora,), output=words),
        Budget(read_rss().now + 10**9),
    )
    request = ask(
        made.model, tmp_path, prompt=None, prompt_embeds=words, num_inference_steps=1, width=64, height=64,
        guidance_scale=6.0, scheduler=Scheduler.DDIM,
    )  # fmt: skip
    for strength, is_told in ((1.5, False), (0.5, True)):
        said: list[str] = []
        got, _ = rendered(replace(request, loras=(f"{made.file}=0:{strength}",)), said)
        assert torch.equal(got, changed)
        assert any("encoded without these LoRAs" in note for note in said) == is_told
