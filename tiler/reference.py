"""The phase between guide and canvas: turn the picture that the canvas starts from into latents of the canvas's
size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from tiler import interrupts, previewing
from tiler.decoding import FACTOR, method
from tiler.decoding.frozen import Part
from tiler.decoding.lockstep import SlabsElsewhere
from tiler.decoding.rows import Pixels
from tiler.diffusion import guide, stored, stored_files
from tiler.diffusion.poster import Poster
from tiler.diffusion.spot import BoxPixels
from tiler.diffusion.stored import StoredArray
from tiler.events import Phase, percent
from tiler.jobs.passes import remember
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.pixels import decode_pixels
from tiler.planning.peaks import vae_streaming
from tiler.planning.tiling import pixels_of
from tiler.render_run import RenderRun
from tiler.request import GuideUpscale


def make_reference(
    run: RenderRun, picture: np.ndarray | Poster | None, guide_latents: Tensor | None,
    encoders: SlabsElsewhere | None = None,
) -> Tensor | StoredArray | None:  # fmt: skip
    """The user's `picture`, or else the guide, as latents of the canvas's size, (1, C, H, W) fp32 scaled; None without
    either. Only the part around the spot of a poster is encoded. There may be others, `encoders`, that encode."""
    if run.plan.stored:
        assert not isinstance(picture, Poster)
        return _stored_reference(run, picture, guide_latents, encoders)
    if run.job.has_reference:
        return run.job.load_reference()
    if guide_latents is None and picture is None:
        return None
    (_, _, reference), *more = _reference_parts(run, picture, guide_latents, encoders)
    assert not more, "a canvas in memory has one part"
    run.job.save_reference(reference)
    run.job.clear_spool()
    return reference


def _stored_reference(
    run: RenderRun, picture: np.ndarray | None, guide_latents: Tensor | None, encoders: SlabsElsewhere | None
) -> StoredArray | None:
    place = run.stored_folder / stored_files.REFERENCE
    if not place.exists():
        if guide_latents is None and picture is None:
            return None
        new = place.with_suffix(".new")
        with StoredArray(new, run.plan.shape, new=True) as array:
            for top, left, part in _reference_parts(run, picture, guide_latents, encoders):
                array.put(part, top, left)
            array.sync()
        new.replace(place)
        run.job.clear_spool()
    return run.files.enter_context(StoredArray(place, run.plan.shape, new=False))


def _reference_parts(
    run: RenderRun, picture: np.ndarray | Poster | None, guide_latents: Tensor | None, encoders: SlabsElsewhere | None
) -> Iterator[Part]:
    request, plan = run.request, run.plan
    height, width = pixels_of(plan.canvas)
    spec, wraps = plan.family.autoencoder, request.wrap.axes
    if guide_latents is not None and request.guide_upscale is GuideUpscale.LATENT:
        assert plan.guide is not None
        rows = stored.band_rows(plan.shape) if plan.stored else plan.canvas[0]
        for top in range(0, plan.canvas[0], rows):
            seen = slice(top, top + rows)
            yield Part(top, 0, guide.upscale(guide_latents, plan.guide, plan.canvas, wraps, seen))
        return
    vae, name = run.models.vae(spec), Phase.GUIDE_PICTURE
    begin = picture.digest if isinstance(picture, Poster) else picture if guide_latents is None else guide_latents
    options = vae_streaming(spec, vae, plan.decode_precision)._asdict()
    assert begin is not None
    spool = remember(run.job.spool, "the guide's picture", plan.methods[name], begin, run.on_event, run.note)
    with (
        interrupts.deferred(),
        run.phase(name, 100),
        run.streamed(vae, spec.weights, families.vae_names, plan.resident[name], **options) as streamer,
    ):
        box: tuple[float, float] | None = None
        decoded = 0.0  # share of the phase's work that is decoding
        check, tell = at_rows(run.budget, plan.memory.peak_of(name)), percent(run.on_event, name)
        if guide_latents is not None:
            assert plan.guide is not None
            unscaled, decoder = spec.unscale_(guide_latents), plan.methods["guide decoded"]
            work = method.work_of(decoder, vae, plan.guide[:2])
            decoded = work / (work + method.work_of(plan.methods[name], vae, plan.canvas))
            strips = decode_pixels(decoder, vae, streamer, unscaled, check, lambda done: tell(decoded * done))
            picture = np.concatenate(list(strips))
            previewing.learn(run.preview, spec.scale(unscaled), picture)
            box = (FACTOR * plan.guide.shown_height, FACTOR * plan.guide.shown_width)
        assert picture is not None
        if plan.smaller is not None:  # nothing of it is cut off
            box = plan.smaller
        encoder = plan.methods[name]
        pixels: Pixels
        if isinstance(picture, Poster):
            assert plan.spot is not None
            pixels = BoxPixels(picture, plan.spot)
        else:
            pixels = guide.crop_to_aspect(
                picture, height, width, box, wraps, encoder.margin_pixels, request.guide_sharpen
            )

        def progress(done: float) -> None:
            tell(decoded + (1 - decoded) * done)

        held = dict[str, Any](check=check, progress=progress, spool=spool, slabs=encoders)
        if not plan.stored:
            yield Part(0, 0, spec.scale(method.encode(encoder, vae, streamer, pixels, **held)))
            return
        assert isinstance(pixels, guide.LazyResize)
        for top, left, part in method.encode_parts(encoder, vae, streamer, pixels, **held):
            yield Part(top, left, spec.scale(part))
