"""The messages between machines: the job that all workers share, tiles, and answers. They consist of plain numbers,
texts and arrays."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tiler.errors import ClusterError
from tiler.jobs import coding
from tiler.version import versions as installed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from tiler.decoding.messages import Piece, Report
    from tiler.diffusion.runner import Tile
    from tiler.models.samples import Prompt
    from tiler.render_run import RenderRun
    from tiler.request import ResolvedRequest

FORGOTTEN = 120.0  # seconds without a task after which another render may take a worker
WORKER_FOLDER = "TILER_WORKER_FOLDER"  # the variable that names the folder for temporary files of local:N workers


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all machines: other versions may compute other bits or not understand
    the job."""
    found = installed("torch", "diffusers")
    return found | {"python": ".".join(platform.python_version_tuple()[:2])}


Window = Sequence[Any]
"""The place of a tile and its conditions: the fields of its Text2ImageRegion, in order, without its weights."""


def window_of(tile: Tile) -> Window:
    """Return the window of a tile as plain numbers. The weights stay here, since only the blend needs them."""
    region = tile.region
    return tuple(getattr(region, field.name) for field in fields(region) if field.name != "weights")


def tile_of(window: Window, latents: Tensor) -> Tile:
    """Return `latents` (C, h, w) as the tile of a window. It has no weights."""
    import torch

    from tiler.diffusion.runner import Tile
    from tiler.diffusion.tiles import Text2ImageRegion

    names = [field.name for field in fields(Text2ImageRegion) if field.name != "weights"]
    region = Text2ImageRegion(**dict(zip(names, window, strict=True)), weights=torch.empty(0))
    return Tile(latents[None], region)


class Taken(ClusterError):
    """The worker has the denoiser of another render open."""


def digest_of(prediction: np.ndarray) -> str:
    """Return a digest of the prediction for a probe tile, (1, C, h, w) fp32. Machines with equal digests compute equal
    bits."""
    return hashlib.sha256(prediction.tobytes()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class SharedJob:
    """All facts of a render that a worker needs to predict its tiles. `texts` are the encoded prompts; `model_id`
    identifies the denoiser's files; `reads_text` says whether the model's parts include text encoders, if they are
    present; `embeds` whether prompts name embeddings."""

    name: str
    request: ResolvedRequest
    model_id: str
    reads_text: bool
    embeds: bool
    texts: Mapping[str | None, Prompt]

    @classmethod
    def of(cls, run: RenderRun, texts: Mapping[str | None, Prompt]) -> SharedJob:
        """The job of a render, in the precision that its plan chose, whatever each worker would choose."""
        from tiler.denoiser import denoiser_id

        return cls(
            name=secrets.token_hex(8), request=replace(run.request, precision=run.plan.precision),
            model_id=denoiser_id(run.models), reads_text=bool(run.plan.family.encoders),
            embeds=bool(run.spoken.read_as.embeddings), texts=texts,
        )  # fmt: skip

    @classmethod
    def of_coder(cls, run: RenderRun) -> SharedJob:
        """The job of a render's decoding or encoding, in the precision that its plan chose."""
        from tiler.denoiser import vae_id
        from tiler.request import DecodePrecision

        request = replace(run.request, decode_precision=DecodePrecision(run.plan.decode_precision))
        return replace(cls.of(run, {}), request=request, model_id=vae_id(run.plan.family.autoencoder))

    def to_bytes(self) -> bytes:
        from safetensors.torch import save

        tensors = {}
        for number, prompt in enumerate(self.texts.values()):
            tensors[f"tokens.{number}"] = prompt.tokens.float().contiguous().clone()
            if prompt.pooled is not None:
                tensors[f"pooled.{number}"] = prompt.pooled.float().contiguous().clone()
        said = {
            "versions": versions(), "name": self.name, "request": coding.encode(self.request),
            "model_id": self.model_id,
            "reads_text": self.reads_text, "embeds": self.embeds, "texts": list(self.texts),
        }  # fmt: skip
        return save(tensors, metadata={"job": json.dumps(said)})

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> SharedJob:
        """Return the job in `data`, of which only the tensors are copied. Raises ClusterError for a job of other
        versions."""
        view = memoryview(data)
        begin = 8 + int.from_bytes(view[:8], "little")
        header = json.loads(bytes(view[8:begin]))
        said = json.loads(header.pop("__metadata__")["job"])
        theirs, ours = said["versions"], versions()
        if different := [
            f"{name} {ours.get(name)} here, {v} there" for name, v in theirs.items() if ours.get(name) != v
        ]:
            raise ClusterError(f"other versions: {', '.join(different)}; install the same on each machine")
        import numpy as np
        import torch

        from tiler.models.samples import Prompt
        from tiler.request import ResolvedRequest

        def tensor(place: dict[str, Any]) -> torch.Tensor:
            first, last = place["data_offsets"]
            values = np.frombuffer(view[begin + first : begin + last], np.float32)
            return torch.from_numpy(values.reshape(place["shape"]).copy())  # the copy is aligned

        tensors = {name: tensor(place) for name, place in header.items()}
        texts = {
            text: Prompt(tensors[f"tokens.{n}"], tensors.get(f"pooled.{n}")) for n, text in enumerate(said["texts"])
        }
        return cls(
            name=said["name"], request=coding.decode(ResolvedRequest, said["request"]), model_id=said["model_id"],
            reads_text=said["reads_text"], embeds=said["embeds"], texts=texts,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """A worker's answer to a job: ready, or the reason why not. If `is_taken`, another render has the worker, and it
    may be asked again. `digest` is that of a probe tile's prediction, which is the same on machines that compute equal
    bits; `seconds` is the time that it took, `batch` the largest number of samples in one pass."""

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
        """Return the greeting in `text`, without the fields of other versions that are not known here."""
        said: dict[str, Any] = json.loads(text)
        return cls(**{name: value for name, value in said.items() if name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A worker's expectation of a job before it opens the weights: `seconds` for each tile in passes of `tiles` tiles,
    or the reason why it would refuse the job. `instructions` are those of its arithmetic; workers that differ in them
    compute different bits."""

    refusal: str = ""
    seconds: float = 0.0
    tiles: int = 1
    instructions: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class BandPlace(NamedTuple):
    """A band of a picture: its number, its first and last column of latents that are pushed, the part of them that is
    kept, and the width of all latents."""

    number: int
    first: int
    last: int
    keep: tuple[int, int]
    width: int


class Answer(NamedTuple):
    """The guided predictions of a task's tiles, (n, C, h, w) fp32, or the error that occurred."""

    predictions: np.ndarray | None
    seconds: float
    peak_rss_bytes: int
    error: str = ""
    is_numerical: bool = False
    is_closed: bool = False  # the job is not open there, or no longer


class SlabAnswer(NamedTuple):
    """What a slab tells, or the error that occurred."""

    told: Report | Piece | None
    seconds: float
    peak_rss_bytes: int
    error: str = ""
    is_closed: bool = False  # the job is not open there, or no longer
