"""The forward of diffusers' LuminaNextDiT2DModel, one sample at a time, by the walk of dit.py.

Zhuo et al. 2024, arXiv:2406.18583. Queries and keys are normalised over all heads at once, several heads share a key,
and the results of attention and feed-forward are normalised before they are added. This needs complete rows, so the
layers are not cut into groups of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.layers import attend, linear_layers
from tiler.compute.stream import Streamer
from tiler.memory.lean_imports import lean_imports
from tiler.models.dit import CHUNK, QUERIES, FeedForward, Normed, add_feed_forward, cut, each, project
from tiler.models.meta import on_meta, refusing
from tiler.models.patches import PATCH, patches, unpatched
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel, LuminaNextDiTBlock


class Turns(NamedTuple):
    """The factors (tokens, 1, head / 2) complex of queries and keys, and how much sharper than usual the attention
    between them is."""

    values: Tensor
    sharpness: float


def build_transformer(checkpoint: Checkpoint, config: dict[str, Any]) -> LuminaNextDiT2DModel:
    """Build diffusers' own transformer on the meta device, without the parameter that it never uses."""
    with lean_imports():
        from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiT2DModel
    with on_meta(), refusing("transformer", checkpoint):
        model: Any = LuminaNextDiT2DModel.from_config(config)
    del model.pad_token
    return model.eval().requires_grad_(False)


def modulating(model: LuminaNextDiT2DModel) -> list[nn.Linear]:
    """The layers whose only inputs are timestep and prompt, in the order in which a pass needs their values."""
    layers: list[Any] = list(model.layers)
    return [*(layer.norm1.linear for layer in layers), model.norm_out.linear_1]


def read_once(name: str) -> bool:
    """Whether a parameter belongs to a modulation layer, or to a layer that computes its input."""
    return name.startswith(("time_caption_embed.", "norm_out.linear_1.")) or ".norm1.linear." in name


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks do, except the modulation layers."""
    return name.startswith("layers.") and not read_once(name)


def conditioning(model: LuminaNextDiT2DModel, times: Tensor, text: Tensor) -> Tensor:
    """The input (n, d) of the modulation layers, from `times` (n,), 0 for pure noise and 1 for none, and a prompt's
    tokens (1, T, width)."""
    layer = model.time_caption_embed
    seen: Tensor = layer.timestep_embedder(layer.time_proj(times)) + layer.caption_embedder(text.mean(dim=1))
    return seen


def rotation(height: int, width: int, size: int, native: int) -> Turns:
    """e^iθ of alternating rows and columns, for height × width patches and a model trained on native × native.
    Positions in a larger picture are as close to each other as those of a native one, and attention between more tokens
    is sharper: the pipeline's linear factor, which applies at all times with its scaling_watershed of 1, and its
    proportional attention."""
    nearer = math.sqrt(height * width / native**2)
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, size // 2, 2, dtype=torch.float32) / (size // 2)) / nearer
    down, across = (torch.outer(torch.arange(count), frequencies) for count in (height, width))
    pairs = torch.stack([down[:, None].expand(-1, width, -1), across[None].expand(height, -1, -1)], dim=-1)
    angles = pairs.flatten(2).flatten(0, 1)
    values = torch.polar(torch.ones_like(angles), angles)[:, None]
    return Turns(values, math.sqrt(math.log(height * width, native**2)))


def predict_sample(
    model: LuminaNextDiT2DModel,
    streamer: Streamer,
    latents: Tensor,
    text: Tensor,
    modulation: list[Tensor],
    native: int,
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The prediction of LuminaNextDiT2DModel, (1, C, h, w), for latents of that shape and a prompt's tokens (1, T,
    width); the variances beside it are not computed to the end. `modulation`: the values of each of
    `modulating(model)`; `native`: the number of patches along a side of the pictures it was trained on."""
    channels, (height, width) = latents.shape[1], (n // PATCH for n in latents.shape[2:])
    into: Any = model.patch_embedder.proj
    x: Tensor = into(patches(latents))
    turns, rows = rotation(height, width, model.head_dim, native), iter(modulation)
    layers: list[Any] = list(model.layers)
    for i, block in enumerate(layers):
        check(f"transformer.layers.{i}")
        predict_block(streamer, block, x, text, next(rows), turns)
    check("transformer.norm_out")
    last: Any = model.norm_out
    out = x.new_empty(1, x.shape[1], last.linear_2.out_features)
    project(streamer, last.linear_2, scaled(last.norm, x, next(rows)), out)
    return unpatched(out, height, channels)


def scaled(norm: nn.Module, x: Tensor, scale: Tensor) -> Normed:
    """norm(x) · (1 + scale); x: (1, tokens, d), scale: (d,)."""

    def at(tokens: slice) -> Tensor:
        made: Tensor = norm(x[:, tokens])
        return made if made.is_meta else made.mul_(1 + scale)

    return at


def predict_block(
    streamer: Streamer, block: LuminaNextDiTBlock, x: Tensor, text: Tensor, modulation: Tensor, turns: Turns
) -> None:
    """Apply a LuminaNextDiTBlock to the state x (1, tokens, d), in place; modulation: (4 d,)."""
    scale, gate, ff_scale, ff_gate = modulation.chunk(4)
    normed, attn = scaled(block.norm1.norm, x, scale), block.attn2
    attended = self_attention(streamer, block.attn1, x, normed, turns)
    add_text(streamer, block, attended, normed, text, turns)
    with streamer.hold(attn.to_out[0]):
        for tokens in _chunks(x):
            add_normed(x, tokens, block.norm2, attn.to_out[0](attended[:, tokens]), gate)
    del attended
    layer: Any = block.feed_forward
    layers = FeedForward(layer.linear_1, nn.SiLU(), layer.linear_2, layer.linear_3)
    made, everything = torch.zeros_like(x), slice(0, x.shape[1])
    normed = scaled(block.ffn_norm1, x, ff_scale)
    add_feed_forward(streamer, layers, made, everything, normed, x.new_ones(x.shape[2]))
    for tokens in _chunks(x):
        add_normed(x, tokens, block.ffn_norm2, made[:, tokens], ff_gate)


def _chunks(x: Tensor) -> Iterator[slice]:
    """Yield slices of the tokens of x (1, n, d), some at a time."""
    return each(cut(slice(0, x.shape[1]), CHUNK), x.is_meta)


def add_normed(x: Tensor, tokens: slice, norm: nn.Module, made: Tensor, gate: Tensor) -> None:
    """x += tanh(gate) · norm(made) at `tokens`, in place; made: (1, n, d), gate: (d,)."""
    normed = norm(made)
    if not normed.is_meta:
        x[:, tokens].addcmul_(gate.tanh(), normed)


def self_attention(streamer: Streamer, attn: Any, x: Tensor, normed: Normed, turns: Turns) -> Tensor:
    """Attention between the tokens of x (1, n, d): (1, n, width), before its last layer."""
    layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
    out, keys, values = (x.new_empty(1, x.shape[1], layer.out_features) for layer in layers)
    factors = turns.values * turns.sharpness, turns.values
    for some in [[0, 1, 2]] if streamer.fits(*layers) else [[0], [1], [2]]:
        with streamer.hold(*(layers[i] for i in some)):
            for tokens in _chunks(x):
                for i, made in zip(some, linear_layers([layers[i] for i in some], normed(tokens)), strict=True):
                    if (norm := norms[i]) is not None:
                        made = _turned(norm(made), factors[i][tokens])
                    if not made.is_meta:
                        (out, keys, values)[i][:, tokens] = made
    size = out.shape[2] // attn.heads
    queries, keys, values = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (out, keys, values))
    together = attn.heads // keys.shape[1]  # heads that share a key
    for head in each(range(keys.shape[1]), x.is_meta, [1] * keys.shape[1]):
        mine, shared = slice(head * together, (head + 1) * together), slice(head, head + 1)
        k, v = (part[:, shared].expand(-1, together, -1, -1) for part in (keys, values))
        for tokens in each(cut(slice(0, x.shape[1]), QUERIES), x.is_meta):
            queries[:, mine, tokens].copy_(attend(queries[:, mine, tokens], k, v, attn.to_q))
    return out


def add_text(
    streamer: Streamer, block: LuminaNextDiTBlock, attended: Tensor, normed: Normed, text: Tensor, turns: Turns
) -> None:
    """attended += cross attention to text (1, T, width), each head with its own gate, in place. Queries are rotated by
    their positions; keys have none."""
    attn: Any = block.attn2
    gate = block.gate.tanh()[:, None]
    with streamer.hold(attn.to_q, attn.to_k, attn.to_v):
        context = block.norm1_context(text)
        keys, values = attn.norm_k(attn.to_k(context)), attn.to_v(context)
        size = attn.to_q.out_features // attn.heads
        keys, values = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (keys, values))
        together = attn.heads // keys.shape[1]
        keys, values = (part.repeat_interleave(together, dim=1) for part in (keys, values))
        for tokens in _chunks(attended):
            queries = _turned(attn.norm_q(attn.to_q(normed(tokens))), turns.values[tokens])
            made = attend(queries.unflatten(-1, (-1, size)).transpose(1, 2), keys, values, attn.to_q).transpose(1, 2)
            if not made.is_meta:
                attended[:, tokens].unflatten(-1, (-1, size)).addcmul_(gate, made)


def _turned(x: Tensor, by: Tensor) -> Tensor:
    """Multiply the pairs of neighbours in each head of x (1, n, width) by (n, 1, head / 2) complex, in place."""
    if not x.is_meta:
        torch.view_as_complex(x.view(*x.shape[:2], -1, by.shape[2], 2)).mul_(by)
    return x
