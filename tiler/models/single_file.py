"""Assemble a checkpoint from files: a single file, or a denoiser alone, with parts from flags, from neighbouring files
and from the user's folders; or a folder with some parts replaced.

No decision rests on a file's name alone, and nothing is downloaded. Every decision is reported in a note or in a part's
label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tiler.errors import ModelError, UsageError
from tiler.models.contents import DENOISERS, Kind
from tiler.models.derived import denoiser_config, text_config, tiny_config, vae_config
from tiler.models.kinds import SD2, Encoder, FamilyRow, family_of, row_of_pipeline
from tiler.models.known_parts import KnownPart, find_encoder, find_vae, known_parts, t5_tokenizer
from tiler.models.part_files import FoundPart, WeightFile, find_parts
from tiler.models.prediction import Decided, decide
from tiler.models.vocabulary import clip_tokenizer
from tiler.request.model import ModelOptions, Prediction
from tiler.weights.checkpoint import Checkpoint, PartSource
from tiler.weights.places import expand

Config = dict[str, Any]
_TEXT_KINDS = (Kind.CLIP, Kind.T5)


def assemble(checkpoint: Checkpoint, options: ModelOptions) -> Checkpoint:
    """The checkpoint, with a source for every part that is not a folder of its own. Raises ModelError, naming the kind
    of a file or a missing part with the flag for it, and UsageError for flags that do not fit."""
    path = checkpoint.file if options.diffusion_model is None else expand(options.diffusion_model)
    if path is None and not options.replaced() and options.prediction is None:
        return checkpoint
    return _Assembly(checkpoint, options, path).made()


def tiny_of_file(path: Path) -> Checkpoint:
    """A TAESD file, whole or the decoder alone, as a checkpoint of one model. Raises ModelError."""
    found = find_parts(str(path), "--tiny-vae", (Kind.TINY_VAE,))[0]
    source = PartSource(config=tiny_config(found.shapes, str(path)), index=found.tensors, label=str(path))
    return Checkpoint(name=str(path), folder=path.parent, variant=None, file=path, sources={"": source})


class _Assembly:
    """A checkpoint during assembly."""

    def __init__(self, base: Checkpoint, options: ModelOptions, path: Path | None) -> None:
        self.base, self.options, self.path = base, options, path
        self.sources: dict[str, PartSource] = {}
        self.tokenizers: dict[str, Path] = {}
        self.notes: list[str] = []
        self.file = WeightFile(path) if path is not None else None
        self.row = self._row()
        whole = base.file is not None and base.file != path
        self.files = [file for file in (self.file, WeightFile(base.file) if whole and base.file else None) if file]

    @cached_property
    def known(self) -> list[KnownPart]:
        """The parts in the model folders, searched only if a part is missing, and once."""
        return known_parts(self.options.model_dirs)

    @property
    def name(self) -> str:
        return str(self.path or self.base.name)

    @property
    def in_folder(self) -> bool:
        """Whether parts without another source are folders of the checkpoint."""
        return self.base.file is None

    def made(self) -> Checkpoint:
        if self.file is not None:
            self._add_denoiser(self.file)
        self._add_prediction()
        self._add_vae()
        self._add_encoders()
        self.notes += [note for file in self.files for note in file.notes]
        return self.base.with_sources(self.sources, self.tokenizers, tuple(self.notes))

    def _row(self) -> FamilyRow:
        if self.file is None:
            unet = self.base.config("unet") if self.base.has("unet") else {}
            row = row_of_pipeline(str(self.base.config("", "model_index.json").get("_class_name")), unet)
            if row is None:
                raise ModelError(
                    f"{self.base.name}: tiler cannot replace parts of this kind of model; leave out --vae, --text-encoder and their like"
                )
            return row
        found = self.file.contents.find(*DENOISERS)
        if not found:
            raise ModelError(
                f"{self.file.path}: this file holds {self.file.contents.named} and no denoiser; give it with --vae or --text-encoder, and the "
                "model with --model"
            )
        return family_of(found[0], str(self.file.path))

    def _add_denoiser(self, file: WeightFile) -> None:
        (part,) = file.parts(*DENOISERS)
        row, config = self.row, denoiser_config(part.shapes, self.row, str(file.path))
        if self.in_folder:
            folder = row_of_pipeline(str(self.base.config("", "model_index.json").get("_class_name")), {})
            if folder is None or folder.kind is not row.kind:
                raise ModelError(
                    f"{file.path}: this is {part.kind}, {self.base.name} is another model; give a --model of the same family"
                )
            own = self.base.config(row.part)
            if not row.encoders:
                config = own | config
            elif all(own.get(key) in (None, value) for key, value in config.items() if key in _TOLD_BY_SHAPES):
                config = own
        elif not row.encoders:
            raise ModelError(
                f"{file.path}: this is {part.kind} alone; give --model FOLDER as well, which has its other parts (run: "
                f"hf download {row.others} --local-dir FOLDER)"
            )
        else:
            self.sources[""] = PartSource(config={"_class_name": row.pipeline, **row.fields}, label=str(file.path))
            self.sources["scheduler"] = PartSource(config=dict(row.scheduler), label="as models of this family have it")
            side = _native(file.words)
            if side is not None and row.kind is Kind.UNET:
                config["sample_size"] = side
        self.sources[row.part] = PartSource(config=config, index=part.tensors, label=str(file.path))

    def _add_prediction(self) -> None:
        said = self.options.prediction
        if self.row.kind is not Kind.UNET:
            if said is not None:
                raise UsageError(f"--prediction is for Stable Diffusion 1.x, 2.x and SDXL; {self.row.title} takes none")
            return
        if self.file is None:
            if said is None:
                return
            decided = Decided(said, "as --prediction says")
        else:
            decided = decide(self.file, self.row, said)
            if not decided.known and self.in_folder:
                return  # as the folder's scheduler says
            what = decided.prediction.value
            self.notes.append(f"{self.file.path.name} is {self.row.title}, which predicts {what} ({decided.why})")
        own = self.base.config("scheduler", "scheduler_config.json") if self.in_folder else dict(self.row.scheduler)
        own["prediction_type"] = "v_prediction" if decided.prediction is Prediction.V else "epsilon"
        if decided.prediction is Prediction.EPSILON:
            own.pop("rescale_betas_zero_snr", None)
        if decided.zero_snr:
            own |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.sources["scheduler"] = PartSource(config=own, label=decided.why)
        if self.file is not None and self.row is SD2 and decided.prediction is Prediction.V and not self.in_folder:
            unet = self.sources["unet"]
            side = _native(self.file.words) or 96
            self.sources["unet"] = replace(unet, config={**unet.config, "sample_size": side})

    def _add_vae(self) -> None:
        given = self.options.vae
        if given is not None:
            self._set_vae(find_parts(given, "--vae", (Kind.VAE,))[0], "--vae")
            return
        beside = self.path.with_suffix(".vae.safetensors") if self.path is not None else None
        if beside is not None and beside.is_file():
            self.notes.append(f"{beside.name} beside the model is its autoencoder; --vae chooses another")
            self._set_vae(find_parts(str(beside), "--vae", (Kind.VAE,))[0], "beside the model")
            return
        found = [part for file in self.files for part in file.parts(Kind.VAE)]
        if found:
            self._set_vae(found[0], "in the model's file")
        elif not self.in_folder:
            path = find_vae(self.known, self.row, self.name)
            self.notes.append(f"the autoencoder is {path}, the only one in the model folders that fits")
            self._set_vae(find_parts(str(path), "--vae", (Kind.VAE,))[0], "in the model folders")

    def _set_vae(self, part: FoundPart, how: str) -> None:
        config = part.config
        if config is None:
            config = vae_config(part.shapes, self.row, str(part.path))
            if self.in_folder:  # files of autoencoders do not say how latents are scaled
                own = self.base.config("vae")
                config |= {
                    key: own[key]
                    for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
                    if key in own
                }
        self.sources["vae"] = PartSource(config=config, index=part.tensors, label=f"{part.path} ({how})")

    def _add_encoders(self) -> None:
        slots = self.row.encoder_parts()
        flags = {"--clip_l": self.options.clip_l, "--clip_g": self.options.clip_g, "--t5xxl": self.options.t5xxl}
        taken: dict[str, tuple[FoundPart, str]] = {}
        if not slots and (said := self.options.replaced().keys() - {"--vae"}):
            raise UsageError(f"{min(said)}: {self.row.title}'s text encoders are read in its folder; leave it out")
        for flag, given in flags.items():
            if given is not None:
                kind = Kind.T5 if flag == "--t5xxl" else Kind.CLIP
                width = {"--clip_l": 768, "--clip_g": 1280}.get(flag)
                slot = next((name for name, e in slots.items() if e.kind is kind and width in (None, e.width)), None)
                if slot is None:
                    raise UsageError(f"{flag}: {self.row.title} has no such text encoder; it has {_titles(slots)}")
                taken[slot] = _pick(find_parts(given, flag, (kind,)), slots[slot]), flag
        if (given := self.options.text_encoder) is not None:
            for part in find_parts(given, "--text-encoder", _TEXT_KINDS):
                taken[_slot_of(part, slots, self.row)] = part, "--text-encoder"
        for file in self.files:
            for part in file.parts(*_TEXT_KINDS):
                fit = [name for name, e in slots.items() if e.kind is part.kind and e.width == part.width]
                if fit and fit[0] not in taken:
                    taken[fit[0]] = part, "in the model's file"
        for slot, encoder in slots.items():
            if slot not in taken and not self.in_folder and self.base.reads_text:
                path = find_encoder(self.known, encoder, self.row, self.name, slot)
                if path is None:
                    continue
                self.notes.append(f"{encoder.title} is {path}, the only one in the model folders that fits")
                taken[slot] = (
                    _pick(find_parts(str(path), encoder.flag, (encoder.kind,)), encoder),
                    "in the model folders",
                )
        for slot, (part, how) in taken.items():
            self._set_encoder(slot, slots[slot], part, how)

    def _set_encoder(self, slot: str, encoder: Encoder, part: FoundPart, how: str) -> None:
        config = part.config
        if config is None:
            config = text_config(part.shapes, encoder, str(part.path))
            rows = config["vocab_size"]
            if encoder.kind is Kind.CLIP and rows > 49408:
                self.notes.append(
                    f"{part.path.name}: the last {rows - 49408} rows of {encoder.title}'s tokens are not used"
                )
        self.sources[slot] = PartSource(config=config, index=part.tensors, label=f"{part.path} ({how})")
        tokenizer = slot.replace("text_encoder", "tokenizer")
        own = part.tokenizer if part.config is not None or encoder.kind is Kind.T5 else None
        if own is not None:
            self.tokenizers[tokenizer] = own
        elif self.in_folder and (self.base.folder / tokenizer).is_dir():
            pass
        elif encoder.kind is Kind.CLIP:
            self.tokenizers[tokenizer] = clip_tokenizer(encoder.pad)
        else:
            self.tokenizers[tokenizer] = t5_tokenizer(part.path, self.row)


# Fields of a denoiser's config that its shapes tell.
_TOLD_BY_SHAPES = frozenset({
    "in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "num_layers",
    "use_linear_projection", "num_single_layers", "guidance_embeds", "joint_attention_dim", "pooled_projection_dim",
    "caption_projection_dim", "qk_norm", "pos_embed_max_size", "num_mmdit_layers", "num_single_dit_layers",
    "caption_channels", "projection_class_embeddings_input_dim",
})  # fmt: skip


def _pick(parts: list[FoundPart], encoder: Encoder) -> FoundPart:
    """Of several the one that is as wide as it should be."""
    return next((part for part in parts if part.width == encoder.width), parts[0])


def _slot_of(part: FoundPart, slots: Mapping[str, Encoder], row: FamilyRow) -> str:
    """Whose place a text encoder takes. Raises ModelError."""
    alike = [name for name, encoder in slots.items() if encoder.kind is part.kind]
    exact = [name for name in alike if slots[name].width == part.width]
    if exact or len(alike) == 1:
        return (exact or alike)[0]
    raise ModelError(
        f"{part.path}: {part.kind} of width {part.width}; {row.title} has {_titles(slots)}: give the flag that names one"
    )


def _titles(slots: Mapping[str, Encoder]) -> str:
    return ", ".join(f"{encoder.title} ({encoder.flag})" for encoder in slots.values())


def _native(words: Mapping[str, str]) -> int | None:
    """The side of a native tile in latents that a file's header states."""
    said = re.fullmatch(r"\(?(\d+)[x, ]+(\d+)\)?", str(words.get("modelspec.resolution", "")))
    if said is None:
        return None
    side = math.isqrt(int(said[1]) * int(said[2])) // 64 * 8
    return side if 32 <= side <= 256 else None
