"""job.json: what a job draws, with what it was begun, and how far it is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from tiler.errors import JobError, StorageError
from tiler.files import replace_durably
from tiler.jobs.coding import decode, encode
from tiler.request import DecodePrecision, Precision, RenderRequest, ResolvedRequest
from tiler.request.options import Panel
from tiler.request.render import OF_THE_MACHINE

SCHEMA = 1
_SAMPLE = 2**20  # bytes at each end of a file, which tell it from others


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`said` is the request as it was given, with absolute paths; `picture` is all of the filled one that decides the
    picture's bytes, files by their content; `made_by` are versions, instruction set and the like, under which bytes are
    equal."""

    said: dict[str, Any]
    picture: dict[str, Any]
    model_id: str
    made_by: dict[str, str]
    methods: dict[str, str]  # of the autoencoder, by phase: what was chosen by the disk's free space stays
    precision: str
    decode_precision: str = "fp32"
    seed: int
    begun: str  # UTC
    max_ram_bytes: int
    finished: dict[str, int] = field(
        default_factory=dict
    )  # the picture's size, inode and time, just before it has its name
    spool: str = ""  # the folder where a decoder's passes are remembered
    canvas: str = (
        ""  # that of a canvas that memory does not hold, which stays where it was begun; else beside the former
    )
    schema: int = SCHEMA

    def as_begun(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request with what was chosen when the job was begun."""
        decode_precision = DecodePrecision(self.decode_precision)
        return replace(request, precision=Precision(self.precision), decode_precision=decode_precision)

    def request(self) -> RenderRequest:
        """The request to go on with. Raises JobError."""
        try:
            request: RenderRequest = decode(RenderRequest, self.said)
        except (TypeError, ValueError, KeyError) as error:
            raise JobError(
                f"the job was begun by another version of tiler ({error}); begin anew with --restart"
            ) from error
        return request


def said_of(request: RenderRequest) -> dict[str, Any]:
    """A request as JSON. Models that are folders or files here get their absolute path."""
    said: dict[str, Any] = encode(request)
    for name in _named_by_text():
        if isinstance(said[name], str) and said[name] != "mini" and os.path.exists(said[name]):
            said[name] = os.path.abspath(said[name])
    return {key: value for key, value in said.items() if key != "restart"}


def _named_by_text() -> list[str]:
    """Fields whose text may be a path: a model's and its parts'."""
    return [f.name for f in fields(RenderRequest) if f.metadata["option"].panel is Panel.MODEL]


def picture_of(request: ResolvedRequest) -> dict[str, Any]:
    """What decides the picture. Where the model lies does not: its id does."""
    names = [
        f.name
        for f in fields(request)
        if f.name not in (*OF_THE_MACHINE, "model", "variant", "revision", "model_dirs", "lora_dir")
    ]
    said = {name: getattr(request, name) for name in names}
    for name in set(_named_by_text()) & set(names):
        if isinstance(said[name], str) and os.path.exists(said[name]):
            said[name] = Path(said[name])  # by its content, wherever it lies
    return {name: _content(value) for name, value in said.items()}


def _content(value: Any) -> Any:
    """A file by its size and a sample of its bytes, whatever field names it."""
    if isinstance(value, tuple | list):
        return [_content(item) for item in value]
    if is_dataclass(value):
        return {f.name: _content(getattr(value, f.name)) for f in fields(value)}
    if not isinstance(value, Path):
        return encode(value)
    try:
        with open(value, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(file.read(_SAMPLE))
            file.seek(max(0, size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    except OSError:
        return {"name": value.name}
    return {"name": value.name, "bytes": size, "sha256": digest.hexdigest()}


def differences(old: Manifest, new: Manifest) -> Iterator[str]:
    """What keeps `new` from going on where `old` ended, most telling first."""
    if old.model_id != new.model_id:
        yield f"the model is another one (its id was {old.model_id}, it is {new.model_id})"
    for key in dict.fromkeys([*old.picture, *new.picture]):
        was, now = old.picture.get(key), new.picture.get(key)
        if was != now:
            yield f"{_option(key)} was {_short(was)}, it is {_short(now)}"


def _option(name: str) -> str:
    found = next((f.metadata["option"] for f in fields(RenderRequest) if f.name == name), None)
    return (found.names[0] if found.names else found.metavar.lower()) if found is not None else name


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write(path: Path, manifest: Manifest) -> None:
    """Raises StorageError."""
    body = asdict(manifest)
    text = json.dumps({"sha256": _digest(body), **body}, indent=1, ensure_ascii=False)
    replace_durably(path, [text.encode("utf-8", "surrogateescape")])


def read(path: Path) -> Manifest:
    """Raises JobError for a file that is not as it was written, and StorageError."""
    try:
        body = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if body["schema"] != SCHEMA:
            raise JobError(
                f"{path}: of schema {body['schema']}, this version knows {SCHEMA}; begin anew with --restart"
            )
        if body.pop("sha256") != _digest(body):
            raise ValueError("its checksum is wrong")
        return Manifest(**body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise JobError(f"{path}: the job is damaged ({error}); begin anew with --restart") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
