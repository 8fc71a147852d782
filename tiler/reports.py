"""The report of a run, for --report and --json, and the texts inside its picture."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tiler.compute.cpu import computed_by
from tiler.decode_run import DecodeRun
from tiler.encode_run import EncodeRun
from tiler.events import Phase
from tiler.files import sha256_of
from tiler.jobs import manifest
from tiler.jobs.manifest import Manifest
from tiler.memory.budget import Budget
from tiler.output.metadata import Facts
from tiler.output.metadata import texts as picture_texts
from tiler.phases import picture_facts
from tiler.planning.summary import SCHEMA, with_old_names
from tiler.render_run import RenderRun
from tiler.request.choices import STDOUT
from tiler.version import versions
from tiler.weights.hashes import V2_DIGITS, auto_v2
from tiler.weights.index import TensorInfo
from tiler.weights.places import expand


def of_render(run: RenderRun) -> dict[str, Any]:
    """The report of a render."""
    request, plan, found = run.request, run.plan, run.plan.family.checkpoint
    counts = with_old_names(dict(run.counts))
    return _common(run.budget, max(run.first_peak_bytes, plan.memory.peak_bytes)) | counts | {
        "tiles": len(plan.regions), "tile_batch": plan.batch, "precision": plan.precision.value,
        "tile_conditioning": request.tile_conditioning.value, "decode": plan.methods[Phase.DECODE].name,
        "decode_precision": plan.methods[Phase.DECODE].precision.value,
        "seed": request.seed, "width": request.width, "height": request.height,
        "model": found.name, "revision": found.revision, "workers": [worker._asdict() for worker in run.workers],
        "encoders": [{"name": e.name, "rows": e.tiles, **e._asdict()} for e in run.encoders],
        "decoders": [{"name": d.name, "rows": d.tiles, **d._asdict()} for d in run.decoders],
    }  # fmt: skip


def of_decode(run: DecodeRun) -> dict[str, Any]:
    """The report of a decode."""
    plan = run.decoding.plan
    facts = {"decode": plan.name, "decode_precision": plan.precision.value, "width": run.width, "height": run.height}
    return _common(run.budget, run.plan.peak_bytes) | facts


def of_encode(run: EncodeRun) -> dict[str, Any]:
    """The report of an encoding."""
    return _common(run.budget, run.plan.peak_bytes) | {
        "prompts": len(run.spoken.texts),
        "bytes": run.output.stat().st_size,
    }


def of_packed(path: Path, index: dict[str, TensorInfo], budget: Budget) -> dict[str, Any]:
    """The report of a quantisation: the file's size in bytes, and the share of its weights that are in int8."""
    infos = [info for info in index.values() if info.path == path]
    weights = {kind: sum(math.prod(i.shape) for i in infos if (i.dtype == "I8") is kind) for kind in (True, False)}
    return _common(budget, 0) | {"bytes": path.stat().st_size, "int8_share": weights[True] / sum(weights.values())}


def of_folder(sizes: dict[str, int], budget: Budget) -> dict[str, Any]:
    """The report of a folder of quantised weights: its size in bytes, in total and for each part."""
    return _common(budget, 0) | {"bytes": sum(sizes.values()), "part_bytes": sizes}


def _common(budget: Budget, predicted: int) -> dict[str, Any]:
    found = {"python": platform.python_version()} | versions("torch", "diffusers", "transformers")
    return {
        "schema": SCHEMA, "peak_rss_bytes": budget.peak_rss_bytes, "peak_sampled": budget.peak_sampled,
        "swapped_bytes": budget.swapped_bytes, "predicted_peak_bytes": predicted,
        "max_ram_bytes": budget.max_bytes, "phases": [asdict(phase) for phase in budget.phases],
        "threads": torch.get_num_threads(), "kernels": computed_by(), "versions": found,
        "time": _now(),
    }  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def texts(run: RenderRun) -> dict[str, str]:
    """The picture's texts; empty if metadata are turned off."""
    plan = run.plan
    found = plan.family.checkpoint
    if not run.request.metadata:
        return {}

    def hash_of(path: Path | None, name: str) -> str | None:
        def tell() -> None:
            run.note(f"computing the hash of {name} once, for the picture's metadata")

        return auto_v2(path, tell) if path is not None and path.is_file() else None

    facts = Facts(
        model=found.name, model_id=run.model_id, revision=found.revision,
        scheduler=plan.scheduler.value,
        precision=plan.precision.value, decode_precision=plan.methods[Phase.DECODE].precision.value,
        kernels=computed_by(), begin=plan.begin,
        clip_skip=plan.family.traits.clip_skip,
        embeddings=run.spoken.read_as.embeddings, loras=run.models.loras.hashes,
        model_hash=hash_of(found.file, found.name),
        vae_hash=None if run.request.vae is None else hash_of(expand(run.request.vae), Path(run.request.vae).name),
        lora_files={lora.file.stem: digests.whole[:V2_DIGITS] for lora, digests in run.models.loras.files},
        guide_sha256=_sha256_of(run.request.guide_image), mask_sha256=_sha256_of(run.request.repaint),
    )  # fmt: skip
    return picture_texts(run.request, facts)


def _sha256_of(picture: Path | None) -> str | None:
    """The sha256 of a file of the user's; None without one, or if it has been removed since the job started."""
    if picture is None:
        return None
    try:
        return sha256_of(picture)
    except OSError:
        return None


def begin_job(run: RenderRun) -> None:
    """Start the run's job, or continue it and report where. A picture for a pipe has no job. Raises JobError,
    JobLocked, StorageError."""
    if run.request.output == STDOUT:
        run.note("a picture on standard output has no job folder: if interrupted, it starts from the beginning")
        return
    job, made_by = run.job, _made_by(run)
    before = job.manifest
    job.facts = picture_facts(run)
    job.begin(
        Manifest(
            said=manifest.said_of(run.said), model_id=run.model_id,
            picture=manifest.picture_of(run.request) | {"loras": run.models.loras.said},
            made_by=made_by, methods={name: method.name for name, method in run.plan.methods.items()},
            precision=run.plan.precision.value,
            decode_precision=run.plan.decode_precision.value, seed=run.request.seed, begun=_now(),
            max_ram_bytes=run.budget.max_bytes,
            spool=str(job.spool_folder(run.request.scratch_folder)),
        )
    )  # fmt: skip
    if before is None:
        return
    where, age = job.found()
    run.note(f"continuing {f'at {where}, saved {age} ago' if where else 'a job that had saved nothing yet'}")
    if changed := [
        f"{k} {before.made_by.get(k)} is now {now}" for k, now in made_by.items() if before.made_by.get(k) != now
    ]:
        run.note(f"the picture may differ in its last bits from one made without a break: {'; '.join(changed)}")


def _made_by(run: RenderRun) -> dict[str, str]:
    return versions("torch", "diffusers") | {"arithmetic": computed_by()}
