"""The texts embedded in a picture: how it was made, without the paths of any files. They are complete before the first
step, so that no text can fail after the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tiler.request import Emphasis, ResolvedRequest, Scheduler, ScheduleType, Wrap
from tiler.request.render import OF_THE_RUN
from tiler.version import VERSION
from tiler.weights.hashes import V2_DIGITS

_EMPHASIS = {Emphasis.NO_NORM: "No norm", Emphasis.IGNORE: "Ignore", Emphasis.NONE: "None"}  # as A1111 writes them
_RESOLVED = ("size", "preset", "scale", "revision")  # given by other values; `revision` by its commit
_FILES = (
    "model",
    "tiny_vae",
    "guide_image",
    "repaint",
    "diffusion_model",
    "vae",
    "text_encoder",
    "clip_l",
    "clip_g",
    "t5xxl",
)

XMP = "XML:com.adobe.xmp"  # the keyword of PNG (third edition), 11.3.3.4
_TRAINED, _COMPOSITE = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"  # IPTC's digital source types


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts about a picture that its request does not contain."""

    model: str  # a name, a hub id or a folder
    model_id: str  # weights.identity.model_id
    model_hash: str | None = None  # AutoV2, if the model is one file
    revision: str | None  # of a hub id
    scheduler: str
    precision: str
    decode_precision: str
    kernels: str  # the library of the arithmetic, and its instructions
    embeddings: Mapping[str, str]  # hashes by name, of those in the prompts
    loras: Mapping[str, str]  # hashes by name
    lora_files: Mapping[str, str] = field(default_factory=dict)  # AutoV2 of the files by name
    vae_hash: str | None = None  # AutoV2, if --vae names an autoencoder that is one file
    guide_sha256: str | None = None  # of the user's picture
    mask_sha256: str | None = None  # of --repaint's picture
    clip_skip: bool  # whether the model has a choice of CLIP's layers
    begin: int  # the step at which the canvas starts; 0 without a guide


def texts(request: ResolvedRequest, facts: Facts) -> dict[str, str]:
    """Return AUTOMATIC1111's `parameters`, and the complete request as JSON under `tiler`. Every text can be encoded as
    UTF-8."""
    r = request
    fields: dict[str, object] = {
        "Steps": r.num_inference_steps, "Sampler": facts.scheduler.removesuffix(" Karras"),
        **({"Schedule type": spread} if (spread := _spread(r, facts)) is not None else {}),
        "CFG scale": r.guidance_scale, "Seed": r.seed, "Size": f"{r.width}x{r.height}",
        **({"Model hash": facts.model_hash} if facts.model_hash is not None else {}), "Model": file_name(facts.model),
        **({"VAE hash": facts.vae_hash} if facts.vae_hash is not None else {}),
        **({"VAE": file_name(r.vae)} if r.vae is not None else {}),
        **({"Denoising strength": r.strength} if facts.begin else {}),
        **_of_prompts(r, facts), "Version": f"tiler {VERSION}",
    }  # fmt: skip
    if hashes := _hashes(facts):
        fields["Hashes"] = hashes
    said = {
        key: value for key, value in asdict(r).items() if key not in (*OF_THE_RUN, *_RESOLVED) and value is not None
    }
    for key in _FILES:
        if said.get(key) is not None:
            said[key] = file_name(said[key])
    found = {
        "precision": facts.precision,
        "decode_precision": facts.decode_precision,
        **({"sampler": facts.scheduler} if r.scheduler is Scheduler.AUTO else {}),
        "kernels": facts.kernels,
        "model_id": facts.model_id,
        **({"model_hash": facts.model_hash} if facts.model_hash is not None else {}),
        "revision": facts.revision,
        **({"lora_hashes": dict(facts.loras)} if facts.loras else {}),
        **({"guide_sha256": facts.guide_sha256} if facts.guide_sha256 is not None else {}),
        **({"mask_sha256": facts.mask_sha256} if facts.mask_sha256 is not None else {}),
    }
    prompt = r.prompt if r.prompt is not None else " | ".join(region.prompt for region in r.regions)
    both = {
        "parameters": infotext(prompt, r.negative_prompt or "", fields),
        "tiler": json.dumps(said | found, default=_plain, ensure_ascii=False),
        XMP: xmp(_COMPOSITE if r.guide_image is not None else _TRAINED),
    }
    return {key: _encodable(text) for key, text in both.items()}


def _of_prompts(request: ResolvedRequest, facts: Facts) -> dict[str, object]:
    """Return the fields that say how the prompts were read, if it differs from the default."""
    fields: dict[str, object] = {}
    if facts.clip_skip and (request.clip_skip or 1) > 1:
        fields["Clip skip"] = request.clip_skip
    fields["RNG"] = "CPU"  # without this, readers assume that a GPU made the noise
    if request.wrap is Wrap.XY:
        fields["Tiling"] = True
    if request.canvas_prompt is not None:
        fields["Hires prompt"] = request.canvas_prompt
    if facts.embeddings:
        fields["TI hashes"] = ", ".join(f"{name}: {digest}" for name, digest in facts.embeddings.items())
    if facts.loras:
        fields["Lora hashes"] = ", ".join(f"{name}: {digest}" for name, digest in facts.loras.items())
    if request.emphasis is not Emphasis.ORIGINAL:
        fields["Emphasis"] = _EMPHASIS[request.emphasis]
    return fields


def _hashes(facts: Facts) -> dict[str, str]:
    """Return the AutoV2 hash of each file by its role, from which Civitai links the files: `Hashes: {"model": …,
    "lora:NAME": …}`."""
    files = {"model": facts.model_hash, "vae": facts.vae_hash} | {f"lora:{k}": v for k, v in facts.lora_files.items()}
    files |= {f"embed:{name}": digest[:V2_DIGITS] for name, digest in facts.embeddings.items()}
    return {name: digest for name, digest in files.items() if digest is not None}


def _spread(request: ResolvedRequest, facts: Facts) -> str | None:
    """Return A1111's name of the schedule type, or None for the scheduler's default."""
    if (asked := request.schedule_type) is not None:
        return "SGM Uniform" if asked is ScheduleType.SGM_UNIFORM else asked.value.capitalize()
    return "Karras" if facts.scheduler.endswith("Karras") else None


def xmp(source_type: str) -> str:
    """Return an XMP packet (ISO 16684-1) that says which part an algorithm has in the picture, in IPTC's NewsCodes."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
        f'"http://cv.iptc.org/newscodes/digitalsourcetype/{source_type}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """Return AUTOMATIC1111's `parameters` text: prompt, `Negative prompt: …`, then `Key: value` pairs on one line.

    Values with a comma, a colon or a newline are JSON-quoted, as readers of the format expect; an object is written as
    JSON without quotes.
    """

    def quote(value: object) -> str:
        if isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text

    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def file_name(place: str | Path) -> str:
    """Return a hub id unchanged (`org/name`), and of any other path the last part, whichever system wrote it. The
    extension of a model file is dropped."""
    text = str(place)
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..", "~")]
    is_id = isinstance(place, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith(".")
    if is_id and not Path(text).exists():
        return text
    name = parts[-1] if parts else Path(text).expanduser().resolve().name
    return name.removesuffix(".safetensors").removesuffix(".gguf")


def _plain(value: Any) -> str:
    """Return the name of a path anywhere else in a request, and any other value as text."""
    return file_name(value) if isinstance(value, Path) else str(value)


def _encodable(text: str) -> str:
    """Replace bytes of a file name that were not UTF-8, and halves of surrogate pairs, by question marks."""
    return text.encode("utf-8", "replace").decode()
