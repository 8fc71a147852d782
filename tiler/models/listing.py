"""List the models in the user's folders: the family and size of each, and whether it fits a ceiling according to the
table of floors. Only headers are read, nothing is planned, and torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiler.errors import ModelError
from tiler.models.contents import DENOISERS, Contents, Kind, look
from tiler.models.kinds import FamilyRow, family_of, of_depth, row_of_pipeline
from tiler.weights.flavours import WEIGHTS, find_weights, names_in, read_json
from tiler.weights.folders import model_files
from tiler.weights.headers import shapes_of
from tiler.weights.hub import INDEX, parts_of

MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A model, or a part of one. `family`: its title, or what else it is; `floor_bytes`: the smallest ceiling that
    renders 2048², None if it cannot render; `lacks`: the parts that must come from elsewhere."""

    path: Path
    family: str
    size_bytes: int
    floor_bytes: int | None = None
    lacks: tuple[str, ...] = ()

    def fits(self, max_bytes: int) -> bool | None:
        return None if self.floor_bytes is None else self.floor_bytes <= max_bytes

    def facts(self, max_bytes: int) -> dict[str, Any]:
        """As --json prints it."""
        return asdict(self) | {"path": str(self.path), "fits": self.fits(max_bytes)}


def list_models(given: Sequence[Path] = ()) -> list[Listed]:
    """Every model, autoencoder and text encoder in the user's folders, or in those `given`, and below. Files of other
    kinds and damaged files are listed as such."""
    return [describe(path) for path in model_files(given)]


def describe(path: Path) -> Listed:
    """Describe one file, or one folder in diffusers layout."""
    try:
        return _folder(path) if path.is_dir() else _file(path)
    except ModelError as error:
        said = str(error).removeprefix(f"{path}: ").split(";")[0]
        return Listed(path=path, family=said, size_bytes=path.stat().st_size if path.is_file() else 0)


def _file(path: Path) -> Listed:
    contents, size = look(shapes_of(path), str(path)), path.stat().st_size
    denoisers = contents.find(*DENOISERS)
    if not denoisers:
        return Listed(path=path, family=contents.named, size_bytes=size)
    row = family_of(denoisers[0], str(path))
    return Listed(
        path=path, family=row.title, size_bytes=size, floor_bytes=row.floor * MB, lacks=tuple(_lacking(contents, row))
    )


def _lacking(contents: Contents, row: FamilyRow) -> Iterable[str]:
    if not row.encoders:
        yield "--model"
    elif not contents.find(Kind.VAE):
        yield "--vae"
    there = contents.find(Kind.CLIP, Kind.T5)
    for encoder in row.encoders:
        if not encoder.optional and sum(part.kind is encoder.kind for part in there) < sum(
            other.kind is encoder.kind and not other.optional for other in row.encoders
        ):
            yield encoder.flag


def _folder(path: Path) -> Listed:
    index = read_json(path / INDEX)
    unet = read_json(path / "unet/config.json") if (path / "unet/config.json").is_file() else {}
    row = row_of_pipeline(str(index.get("_class_name")), unet)
    if row is not None and (path / "transformer/config.json").is_file():
        layers = read_json(path / "transformer/config.json").get("num_layers")
        row = of_depth(row, layers if isinstance(layers, int) else 0)
    weighted = [part for part, has_weights in parts_of(index).items() if has_weights]
    size, lacks = 0, []
    for part in weighted:
        try:
            size += sum(file.stat().st_size for file in find_weights(path / part, None).files)
        except (ModelError, OSError):
            lacks.append(part)
            size += sum((path / part / name).stat().st_size for name in names_in(path / part) if name.endswith(WEIGHTS))
    name = str(index.get("_class_name") or "a pipeline of an unknown kind")
    title, floor_bytes = (name, None) if row is None else (row.title, row.floor * MB)
    return Listed(path=path, family=title, size_bytes=size, floor_bytes=floor_bytes, lacks=tuple(lacks))
