"""Read ComfyUI's graph of nodes: its only sampler, and the nodes that the sampler's inputs lead to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_SAMPLERS = ("KSampler", "KSamplerAdvanced")
_LONGEST = 50  # links to follow


class Graph(NamedTuple):
    """`settings` are values by the names of RenderRequest's fields, `others` values without such a field, and `lacks`
    says why the picture cannot be repeated ("" if it can)."""

    settings: dict[str, Any]
    others: dict[str, Any]
    lacks: str


def read_graph(nodes: Mapping[str, Any]) -> Graph:
    """Read `nodes`, the graph as ComfyUI runs it: {number: {class_type, inputs}}."""
    known = {number: node for number, node in nodes.items() if isinstance(node, dict) and "inputs" in node}
    samplers = [node for node in known.values() if node.get("class_type") in _SAMPLERS]
    custom = sorted({str(n.get("class_type")) for n in known.values() if "Sampler" in str(n.get("class_type"))})
    if len(samplers) != 1 or len(custom) != 1:
        why = f"its graph has {len(samplers)} plain samplers" + (f" ({', '.join(custom)})" if custom else "")
        texts = {f"text of node {i}": t for i, n in known.items() if isinstance(t := n["inputs"].get("text"), str)}
        return Graph({}, texts, f"{why}; tiler repeats pictures of one KSampler")
    inputs: dict[str, Any] = samplers[0]["inputs"]
    names = {"seed": "seed", "noise_seed": "seed", "steps": "num_inference_steps", "cfg": "guidance_scale",
             "sampler_name": "scheduler"}  # fmt: skip
    settings: dict[str, Any] = {
        names[key]: value for key, value in inputs.items() if key in names and isinstance(value, int | float | str)
    }
    settings["negative_prompt"] = ""  # ComfyUI encodes this if no link leads to a text
    for name, key in (("positive", "prompt"), ("negative", "negative_prompt")):
        if isinstance(text := _follow(known, inputs.get(name), ("text", "string", "value")), str):
            settings[key] = text
    for key in ("width", "height"):
        if isinstance(side := _follow(known, inputs.get("latent_image"), (key,)), int):
            settings[key] = side
    if isinstance(model := _follow(known, inputs.get("model"), ("ckpt_name", "unet_name")), str):
        settings["model"] = model.replace("\\", "/").rpartition("/")[2]
    # What ComfyUI calls the scheduler is AUTOMATIC1111's schedule type, and its sampler is our scheduler.
    told = {"Schedule type": inputs.get("scheduler"), "denoise": inputs.get("denoise")}
    others: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    return Graph(settings, others, "")


def _follow(nodes: Mapping[str, Any], value: Any, wanted: tuple[str, ...]) -> Any:
    """Return the first input with a name in `wanted` that a link [number, output] leads to, through nodes that pass it
    on."""
    waiting, seen = [value], set[str]()
    while waiting and len(seen) < _LONGEST:
        link = waiting.pop(0)
        if not (isinstance(link, list) and link and str(link[0]) in nodes) or str(link[0]) in seen:
            continue
        seen.add(str(link[0]))
        inputs: dict[str, Any] = nodes[str(link[0])]["inputs"]
        for name in wanted:
            if name in inputs:
                if not isinstance(inputs[name], list):
                    return inputs[name]
                waiting.insert(0, inputs[name])
        waiting += [other for other in inputs.values() if isinstance(other, list)]
    return None
