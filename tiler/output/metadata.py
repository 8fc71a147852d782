"""The texts that a picture carries: what it was made of, and nothing of where anyone's files lie. Known before the
first step, so that no text can fail after the last one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from tiler.request import Emphasis, ResolvedRequest, ScheduleType, Wrap
from tiler.request.render import OF_THE_RUN
from tiler.weights.hashes import V2_DIGITS

_EMPHASIS = {Emphasis.NO_NORM: "No norm", Emphasis.IGNORE: "Ignore", Emphasis.NONE: "None"}  # as A1111 writes them
_RESOLVED = ("size", "preset", "scale", "revision")  # in the values of others; the last in its commit
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
    """What a request does not say of its picture."""

    model: str  # a name, a hub id or a folder
    model_id: str  # weights.identity.model_id
    model_hash: str | None = None  # AutoV2, of a model that is one file
    revision: str | None  # of a hub id
    scheduler: str
    precision: str
    decode_precision: str
    kernels: str  # whose arithmetic, and with which instructions
    embeddings: Mapping[str, str]  # that the prompts name, and their hashes
    loras: Mapping[str, str]  # by name, and their hashes
    lora_files: Mapping[str, str] = field(default_factory=dict)  # by name: AutoV2 of the files
    vae_hash: str | None = None  # AutoV2, of an autoencoder that --vae names and that is one file
    clip_skip: bool  # whether the model has a choice of CLIP's layers
    begin: int  # the step at which the canvas starts; 0 without a guide


def texts(request: ResolvedRequest, facts: Facts) -> dict[str, str]:
    """AUTOMATIC1111's `parameters`, and the whole request as JSON under `tiler`. Every text can be encoded as UTF-8."""
    r = request
    fields: dict[str, object] = {
        "Steps": r.num_inference_steps, "Sampler": facts.scheduler.removesuffix(" Karras"),
        **({"Schedule type": spread} if (spread := _spread(r, facts)) is not None else {}),
        "CFG scale": r.guidance_scale, "Seed": r.seed, "Size": f"{r.width}x{r.height}",
        **({"Model hash": facts.model_hash} if facts.model_hash is not None else {}), "Model": file_name(facts.model),
        **({"VAE hash": facts.vae_hash} if facts.vae_hash is not None else {}),
        **({"VAE": file_name(r.vae)} if r.vae is not None else {}),
        **({"Denoising strength": r.strength} if facts.begin else {}),
        **_of_prompts(r, facts), "Version": f"tiler {metadata.version('tiler')}",
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
        "kernels": facts.kernels,
        "model_id": facts.model_id,
        **({"model_hash": facts.model_hash} if facts.model_hash is not None else {}),
        "revision": facts.revision,
        **({"lora_hashes": dict(facts.loras)} if facts.loras else {}),
    }
    prompt = r.prompt if r.prompt is not None else " | ".join(region.prompt for region in r.regions)
    both = {
        "parameters": infotext(prompt, r.negative_prompt or "", fields),
        "tiler": json.dumps(said | found, default=_plain, ensure_ascii=False),
        XMP: xmp(_COMPOSITE if r.guide_image is not None else _TRAINED),
    }
    return {key: _encodable(text) for key, text in both.items()}


def _of_prompts(request: ResolvedRequest, facts: Facts) -> dict[str, object]:
    """How the prompts were read, where that is not as usual."""
    fields: dict[str, object] = {}
    if facts.clip_skip and (request.clip_skip or 1) > 1:
        fields["Clip skip"] = request.clip_skip
    fields["RNG"] = "CPU"  # without it, readers take noise for a GPU's
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
    """AutoV2 of all files by their role, from which Civitai links them: `Hashes: {"model": …, "lora:NAME": …}`."""
    files = {"model": facts.model_hash, "vae": facts.vae_hash} | {f"lora:{k}": v for k, v in facts.lora_files.items()}
    files |= {f"embed:{name}": digest[:V2_DIGITS] for name, digest in facts.embeddings.items()}
    return {name: digest for name, digest in files.items() if digest is not None}


def _spread(request: ResolvedRequest, facts: Facts) -> str | None:
    """The schedule type by its name in A1111; None for that of the scheduler itself."""
    if (asked := request.schedule_type) is not None:
        return "SGM Uniform" if asked is ScheduleType.SGM_UNIFORM else asked.value.capitalize()
    return "Karras" if facts.scheduler.endswith("Karras") else None


def xmp(source_type: str) -> str:
    """An XMP packet (ISO 16684-1) that says which part an algorithm has in the picture, by IPTC's NewsCodes."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" '
        'xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
        f'"http://cv.iptc.org/newscodes/digitalsourcetype/{source_type}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )


def infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """AUTOMATIC1111's `parameters` text: prompt, `Negative prompt: …`, then `Key: value` pairs on one line.

    Values with a comma, a colon or a newline are JSON-quoted, as that format's readers expect; an object stands there
    as JSON without quotes.
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
    """A hub id as it is (`org/name`); of any other path its last part, whatever system wrote it, a model file's without
    its ending."""
    text = str(place)
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..", "~")]
    is_id = isinstance(place, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith(".")
    if is_id and not Path(text).exists():
        return text
    name = parts[-1] if parts else Path(text).expanduser().resolve().name
    return name.removesuffix(".safetensors").removesuffix(".gguf")


def _plain(value: Any) -> str:
    """A path anywhere else in a request is told by its name."""
    return file_name(value) if isinstance(value, Path) else str(value)


def _encodable(text: str) -> str:
    """Bytes of a file's name that were no UTF-8, and halves of surrogate pairs, become question marks."""
    return text.encode("utf-8", "replace").decode()
