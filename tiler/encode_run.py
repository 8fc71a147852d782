"""The steps of `tiler encode`: run prompts through a checkpoint's text encoders and write the result to a file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from tiler import encoding
from tiler.encoding import Spoken
from tiler.errors import UsageError
from tiler.events import OnEvent, Phase
from tiler.files import check_writable
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.memory.tuning import MARGIN
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.embeds import Text, Words, kind_of, write_words
from tiler.models.loras import apply_loras, find_loras
from tiler.models.prompting import notes_on_prompts
from tiler.planning.peaks import text_phase
from tiler.planning.resolve import resolve
from tiler.planning.table import MemoryPlan, PhasePlan
from tiler.request import MAX_STEPS, EncodeRequest, RenderRequest, ResolvedRequest
from tiler.request.prompt import Stage
from tiler.request.wording import Wording, canvas_conditions, tags_of
from tiler.run import Run, measure


@dataclass(kw_only=True)
class EncodeRun(Run):
    """A run of `tiler encode`."""

    request: EncodeRequest
    output: Path
    spoken: Spoken
    plan: MemoryPlan


def start(request: EncodeRequest, budget: Budget, on_event: OnEvent) -> EncodeRun:
    """Check that the file can be written, look for prompts that are already encoded, and plan. Raises TilerError."""
    output = request.output or Path("words.safetensors")
    check_writable(output, force=request.force)
    family = families.open_family(request)
    models, found = Models(family), family.checkpoint
    renders = _renders(request)
    loras, *others = {find_loras(one) for one in {tags_of(one): one for one in renders}.values()}
    if others:
        raise UsageError("the prompts name different LoRAs; encode the prompts of each LoRA into a file of their own")
    settings = [resolve(asked, family, loras) for asked in renders]
    models.loras = apply_loras(loras, models)
    texts: list[Text] = list(dict.fromkeys(text for one in settings for text in _texts(one)))
    if family.traits.chunked:
        texts.append("")  # its chunks pad shorter prompts
    spoken = encoding.find_prompts(settings[0], models, list(dict.fromkeys(texts)), None, int8=False)
    for part in family.encoders:
        models.module(part)
    facts = measure(output.parent)
    phase = PhasePlan(name=Phase.ENCODE_PROMPTS, terms=(facts.text_libraries,))
    if not spoken.all_encoded:
        phase = text_phase(models, [facts.text_libraries])
    plan = MemoryPlan(
        max_bytes=budget.max_bytes, phases=(phase,), smallest_bytes=int(phase.peak_bytes / MARGIN) + 1
    )  # fmt: skip
    run = EncodeRun(
        models=models, budget=budget, on_event=on_event, request=request, output=output, spoken=spoken, plan=plan
    )
    on_prompts = dict.fromkeys(note for one in settings for note in notes_on_prompts(one, family, has_guide=True))
    run.tell((*on_prompts, *models.loras.notes, *found.notes, *family.notes, memory_warning(budget.max_bytes)))
    return run


def _renders(request: EncodeRequest) -> list[RenderRequest]:
    """The renders that the file should allow: each prompt with each negative prompt and with none."""
    own = {field.name for field in fields(EncodeRequest)} & {field.name for field in fields(RenderRequest)}
    shared = {name: getattr(request, name) for name in own - {"output", "force"}}
    negatives = (*request.negative_prompts, None)
    return [RenderRequest(prompt=p, negative_prompt=n, **shared) for p in request.prompts for n in negatives]


def _texts(request: ResolvedRequest) -> list[Text]:
    """All texts that these renders may need at any step, for any number of steps, with and without a negative
    prompt."""
    wording = Wording(canvas_conditions(request), Stage(MAX_STEPS))
    return [*dict.fromkeys(wording.texts()), None]


def encode(run: EncodeRun) -> None:
    """Encode the prompts and write them. Raises TilerError."""
    request, family = run.request, run.models.family
    weights = {part.name: (family.checkpoint.weights(part.name), part.aliases) for part in family.encoders}
    with run.phase(Phase.ENCODE_PROMPTS, 1):
        found = encoding.encode_prompts(run, weights, run.spoken)
        words = Words(run.output, found, kind_of(family), run.spoken.read_as, request.prompts, request.negative_prompts)
        write_words(run.output, words, replace=request.force)
