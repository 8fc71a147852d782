"""What goes over the wire: the job that all workers share, tiles, and their answers. Plain numbers, texts and
arrays."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from tiler.errors import ClusterError
from tiler.jobs import coding

if TYPE_CHECKING:
    import numpy as np

    from tiler.diffusion.runner import Tile
    from tiler.models.samples import Prompt
    from tiler.request import ResolvedRequest

WORKER_FOLDER = "TILER_WORKER_FOLDER"  # the variable that names where workers of local:N have their temporary files


def versions() -> dict[str, str]:
    """What must be equal on all machines: other versions may compute other bits, or know another job."""
    found = {name: metadata.version(name) for name in ("tiler", "torch", "diffusers")}
    return found | {"python": ".".join(platform.python_version_tuple()[:2])}


Window = Sequence[Any]
"""A tile's place and what it is made under: the fields of its Text2ImageRegion, in order, without its weights."""


def window_of(tile: Tile) -> Window:
    """As plain numbers; the weights stay with the blend, which alone needs them."""
    region = tile.region
    return tuple(getattr(region, field.name) for field in fields(region) if field.name != "weights")


class Taken(ClusterError):
    """A worker has another render's denoiser open."""


def digest_of(prediction: np.ndarray) -> str:
    """Tells machines that compute equal bits by what they predict for a probe tile, (1, C, h, w) fp32."""
    return hashlib.sha256(prediction.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SharedJob:
    """All that a worker must know of a render to predict its tiles. `texts` are its encoded prompts; `model_id` tells
    the denoiser's files; `reads_text` says whether text encoders belong to the model's parts where they are there,
    `embeds` whether prompts name embeddings."""

    name: str
    request: ResolvedRequest
    model_id: str
    reads_text: bool
    embeds: bool
    texts: Mapping[str | None, Prompt]

    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        tensors = {}
        for number, prompt in enumerate(self.texts.values()):
            tensors[f"tokens.{number}"] = prompt.tokens.contiguous().clone()
            if prompt.pooled is not None:
                tensors[f"pooled.{number}"] = prompt.pooled.contiguous().clone()
        said = {
            "versions": versions(), "name": self.name, "request": coding.encode(self.request),
            "model_id": self.model_id,
            "reads_text": self.reads_text, "embeds": self.embeds, "texts": list(self.texts),
        }  # fmt: skip
        return save(tensors, metadata={"job": json.dumps(said)})

    @classmethod
    def from_bytes(cls, data: bytes) -> SharedJob:
        """Raises ClusterError for a job of other versions."""
        length = int.from_bytes(data[:8], "little")
        said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["job"])
        theirs, ours = said["versions"], versions()
        if different := [
            f"{name} {ours.get(name)} here, {v} there" for name, v in theirs.items() if ours.get(name) != v
        ]:
            raise ClusterError(f"other versions: {', '.join(different)}; install the same on each machine")
        from safetensors.torch import load

        from tiler.models.samples import Prompt
        from tiler.request import ResolvedRequest

        tensors = load(data)
        texts = {
            text: Prompt(tensors[f"tokens.{n}"], tensors.get(f"pooled.{n}")) for n, text in enumerate(said["texts"])
        }
        return cls(
            name=said["name"], request=coding.decode(ResolvedRequest, said["request"]), model_id=said["model_id"],
            reads_text=said["reads_text"], embeds=said["embeds"], texts=texts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """How a worker answers to a job: ready, or why not; one that another render has may be asked again. `digest` is
    of a probe tile's prediction, by which machines that compute equal bits are known; `seconds` is what it took,
    `batch` the most samples of one pass."""

    refusal: str = ""
    is_taken: bool = False
    digest: str = ""
    seconds: float = 0.0
    batch: int = 1
    threads: int = 1
    max_ram_bytes: int = 0
    peak_rss_bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Greeting:
        """Of another version's fields those that are known."""
        said: dict[str, Any] = json.loads(text)
        return cls(**{name: value for name, value in said.items() if name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a worker expects of a job before it opens its weights: `seconds` for each tile in passes of so many
    `tiles`, or why it would not take it. `instructions` say who computes; where they differ, so do bits."""

    refusal: str = ""
    seconds: float = 0.0
    tiles: int = 1
    instructions: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Answer(NamedTuple):
    """The guided predictions of a task's tiles, (n, C, h, w) fp32, or what went wrong."""

    predictions: np.ndarray | None
    seconds: float
    peak_rss_bytes: int
    error: str = ""
    is_numerical: bool = False
    is_closed: bool = False  # the job is not open there (any more)
