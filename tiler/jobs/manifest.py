"""The manifest job.json: the picture that a job draws, the choices made when the job started, and whether it is
finished."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from tiler.errors import DamagedJob, JobError, StorageError
from tiler.files import replace_file
from tiler.jobs.coding import decode, encode
from tiler.request import DecodePrecision, Precision, RenderRequest, ResolvedRequest
from tiler.request.options import Panel
from tiler.request.render import OF_THE_MACHINE

SCHEMA = 1
_SAMPLE = 2**20  # bytes at each end of a file that identify it


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of job.json. `said` is the request as given, with absolute paths. `picture` holds the values of the
    resolved request that determine the picture's bytes; files are identified by their content. `made_by` holds
    versions, the instruction set and other facts: bytes are equal only if these are."""

    said: dict[str, Any]
    picture: dict[str, Any]
    model_id: str
    made_by: dict[str, str]
    methods: dict[str, str]  # of the autoencoder, by phase: they depended on free disk space, and stay as chosen
    precision: str
    decode_precision: str = "fp32"
    seed: int
    begun: str  # UTC
    max_ram_bytes: int
    finished: dict[str, int] = field(
        default_factory=dict
    )  # the picture's size, inode and time, just before it gets its final name
    spool: str = ""  # the folder with the decoder's saved passes
    canvas: str = ""  # the folder of a canvas too large for memory, which stays there; "" for one beside the spool
    schema: int = SCHEMA

    def as_begun(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request with the choices that were made when the job started."""
        decode_precision = DecodePrecision(self.decode_precision)
        return replace(request, precision=Precision(self.precision), decode_precision=decode_precision)

    def request(self) -> RenderRequest:
        """The request of the job, to continue it. Raises JobError."""
        try:
            request: RenderRequest = decode(RenderRequest, self.said)
        except (TypeError, ValueError, KeyError) as error:
            raise JobError(f"another version of tiler started this job ({error}); start over with --restart") from error
        return request


def said_of(request: RenderRequest) -> dict[str, Any]:
    """Convert a request to JSON. Models given as existing folders or files get absolute paths."""
    said: dict[str, Any] = encode(request)
    for name in _named_by_text():
        if isinstance(said[name], str) and said[name] != "mini" and os.path.exists(said[name]):
            said[name] = os.path.abspath(said[name])
    return {key: value for key, value in said.items() if key != "restart"}


def _named_by_text() -> list[str]:
    """The fields whose text may be a path: the model and its parts."""
    return [f.name for f in fields(RenderRequest) if f.metadata["option"].panel is Panel.MODEL]


def picture_of(request: ResolvedRequest) -> dict[str, Any]:
    """The values of a request that determine the picture. The model's location is left out, since its id is
    compared."""
    names = [
        f.name
        for f in fields(request)
        if f.name not in (*OF_THE_MACHINE, "model", "variant", "revision", "model_dirs", "lora_dir")
    ]
    said = {name: getattr(request, name) for name in names}
    for name in set(_named_by_text()) & set(names):
        if isinstance(said[name], str) and os.path.exists(said[name]):
            said[name] = Path(said[name])  # identified by content, independent of its location
    return {name: _content(value) for name, value in said.items()}


def _content(value: Any) -> Any:
    """Convert a value to JSON. Each file is identified by its name, its size and a hash of a sample of its bytes."""
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
    """The reasons why `new` cannot continue the job of `old`, the most informative first."""
    if old.model_id != new.model_id:
        yield f"the model has changed (its id was {old.model_id} and is now {new.model_id})"
    for key in dict.fromkeys([*old.picture, *new.picture]):
        was, now = old.picture.get(key), new.picture.get(key)
        if was != now:
            yield f"{option_name(key)} was {_short(was)} and is now {_short(now)}"


def option_name(name: str) -> str:
    """The option of the command line that gives the field `name` of a request; the field itself if there is none."""
    found = next((f.metadata["option"] for f in fields(RenderRequest) if f.name == name), None)
    return (found.names[0] if found.names else found.metavar.lower()) if found is not None else name


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def write(path: Path, manifest: Manifest) -> None:
    """Write a manifest durably, with a checksum. Raises StorageError."""
    body = asdict(manifest)
    text = json.dumps({"sha256": _digest(body), **body}, indent=1, ensure_ascii=False)
    replace_file(path, [text.encode("utf-8", "surrogateescape")], durable=True)


def read(path: Path) -> Manifest:
    """Read a manifest. Raises JobError for a file that differs from what was written, and StorageError."""
    try:
        body = json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        if body["schema"] != SCHEMA:
            raise JobError(
                f"{path}: the job has schema {body['schema']}, but this version of tiler reads {SCHEMA}; start over with --restart"
            )
        if body.pop("sha256") != _digest(body):
            raise ValueError("its checksum is wrong")
        return Manifest(**body)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedJob(f"{path}: the job is damaged ({error}); start over with --restart") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
