"""The forward of diffusers' HunyuanDiT2DModel, one sample at a time, by the walk of dit.py.

Li et al. 2024, arXiv:2405.08748. Blocks of the second half also take the states of the first half's blocks, which wait
in a scratch file: at 1024² they would take 440 MB. The prompt enters through cross attention, with learned tokens in
the place of padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.layers import attend
from tiler.compute.stream import Streamer
from tiler.memory.lean_imports import lean_imports
from tiler.models.dit import (
    CHUNK,
    Normed,
    add_attended,
    add_feed_forward,
    attention,
    cut,
    each,
    gelu_feed_forward,
    modulated,
    project,
    stream_of,
)
from tiler.models.meta import on_meta, refusing
from tiler.models.nameless import NamelessFile
from tiler.models.patches import PATCH, patches, unpatched
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel, HunyuanDiTBlock

BASE = 32  # patches along the side of the grid over which the positions of any picture are stretched


class Told(NamedTuple):
    """The inputs of a sample's blocks besides the state: the prompt's tokens, (1, T, width), and each modulation
    layer's values."""

    text: Tensor
    modulation: list[Tensor]


def build_transformer(checkpoint: Checkpoint, config: dict[str, Any]) -> HunyuanDiT2DModel:
    """Build diffusers' own transformer on the meta device."""
    with lean_imports():
        from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
    with on_meta(), refusing("transformer", checkpoint):
        model: Any = HunyuanDiT2DModel.from_config(config)
    return model.eval().requires_grad_(False)


def modulating(model: HunyuanDiT2DModel) -> list[nn.Linear]:
    """The layers whose only inputs are timestep and prompt, in the order in which a pass needs their values."""
    blocks: list[Any] = list(model.blocks)
    return [*(block.norm1.linear for block in blocks), model.norm_out.linear]


def read_once(name: str) -> bool:
    """Whether a parameter belongs to a modulation layer, or to a layer that computes its input or the prompt's
    tokens."""
    return name.startswith(("time_extra_emb.", "text_embedder.", "norm_out.")) or ".norm1.linear." in name


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks do, except the modulation layers."""
    return name.startswith("blocks.") and not read_once(name)


def projected(model: HunyuanDiT2DModel, bert: Tensor, t5: Tensor, own: Tensor) -> Tensor:
    """Project BERT's states (1, n, width) and T5's (1, m, wider) to (1, n + m, width), with learned tokens where `own`
    (1, n + m, 1) is false."""
    tokens = torch.cat([bert, model.text_embedder(t5[0])[None]], dim=1)
    return tokens if tokens.is_meta else torch.where(own, tokens, model.text_embedding_padding)


def pooled(pooler: Any, states: Tensor) -> Tensor:
    """Pool the states (1, n, d) as diffusers' HunyuanDiTAttentionPool does, with its layers → (1, P)."""
    x = torch.cat([states.mean(dim=1, keepdim=True), states], dim=1) + pooler.positional_embedding
    parts = pooler.q_proj(x[:, :1]), pooler.k_proj(x), pooler.v_proj(x)
    q, k, v = (part.unflatten(-1, (pooler.num_heads, -1)).transpose(1, 2) for part in parts)
    made: Tensor = pooler.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return made[:, 0]


def conditioning(model: HunyuanDiT2DModel, timesteps: Tensor, pool: Tensor, sides: tuple[int, int] | None) -> Tensor:
    """The input (n, d) of the modulation layers, from `timesteps` (n,), a prompt's pooled vector (1, P) and, up to
    version 1.1, the sample's height and width in pixels, as for a complete picture that was not cropped."""
    layer = model.time_extra_emb
    extra = pool
    if sides is not None:
        numbers = torch.tensor([1024.0, 1024.0, *sides, 0.0, 0.0])
        sizes = layer.size_proj(numbers).flatten()[None].to(pool.device)
        style = layer.style_embedder.weight  # of the only style
        extra = torch.cat([pool, sizes, style], dim=1)
    seen: Tensor = layer.timestep_embedder(layer.time_proj(timesteps)) + layer.extra_embedder(extra)
    return seen


class Skips:
    """States (1, tokens, d) that wait in a file; the last one is read first. On the meta device nothing is stored."""

    def __init__(self, file: NamelessFile | None, x: Tensor) -> None:
        self._file, self._like, self._count = file, x, 0

    def push(self, x: Tensor) -> None:
        if self._file is not None:
            self._file.write(self._count * x.nbytes, x)
        self._count += 1

    def pop(self) -> Normed:
        """Return a function that reads the last state's tokens."""
        self._count -= 1
        begin = self._count * self._like.nbytes

        def tokens(some: slice) -> Tensor:
            rows = torch.empty_like(self._like[:, some])
            if self._file is None:
                return rows
            return self._file.read(begin + some.start * self._like.shape[2] * 4, rows)

        return tokens


def predict_sample(
    model: HunyuanDiT2DModel,
    streamer: Streamer,
    latents: Tensor,
    told: Told,
    scratch: NamelessFile | None,
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The prediction of HunyuanDiT2DModel, (1, C, h, w), for latents of that shape; the variances beside it are not
    computed to the end."""
    channels, (height, width) = latents.shape[1], (n // PATCH for n in latents.shape[2:])
    embedder: Any = model.pos_embed.proj
    x = F.linear(patches(latents), embedder.weight.flatten(1), embedder.bias)
    turns, rows = rotation(height, width, model.inner_dim // model.num_heads), iter(told.modulation)
    blocks: list[Any] = list(model.blocks)
    half, skips = len(blocks) // 2, Skips(scratch, x)
    for i, block in enumerate(blocks):
        check(f"transformer.blocks.{i}")
        if block.skip_linear is not None:
            join(streamer, block, x, skips.pop())
        predict_block(streamer, block, x, told.text, next(rows), turns)
        if i < half - 1:
            skips.push(x)
    check("transformer.proj_out")
    scale, shift = next(rows).chunk(2)
    out = x.new_empty(1, x.shape[1], model.proj_out.out_features)
    project(streamer, model.proj_out, modulated(model.norm_out.norm, x, scale, shift), out)
    return unpatched(out, height, channels)


def join(streamer: Streamer, block: HunyuanDiTBlock, x: Tensor, skip: Normed) -> None:
    """x = the block's projection of x and the waiting state, in place."""
    layers: Any = block

    def both(tokens: slice) -> Tensor:
        made: Tensor = layers.skip_norm(torch.cat([x[:, tokens], skip(tokens)], dim=-1))
        return made

    project(streamer, layers.skip_linear, both, x)


def predict_block(
    streamer: Streamer, block: HunyuanDiTBlock, x: Tensor, text: Tensor, shift: Tensor, turns: Tensor
) -> None:
    """Apply a HunyuanDiTBlock to the state x (1, n, d) behind its skip, in place. `shift`, (d,), is the output of
    norm1's layer for the conditioning; `turns` as returned by `rotation`."""
    everything, attn = slice(0, x.shape[1]), block.attn1
    attended = attention(
        streamer, x, [stream_of(everything, attn, shifted(block.norm1.norm, x, shift))], attn.heads, turns
    )
    ungated = x.new_ones(x.shape[2])
    add_attended(streamer, attn.to_out[0], attended, x, everything, ungated)
    del attended
    add_text(streamer, block, x, text, turns)
    layers = gelu_feed_forward(block.ff)
    norm3: Any = block.norm3
    add_feed_forward(streamer, layers, x, everything, lambda tokens: norm3(x[:, tokens]), ungated)


def shifted(norm: nn.Module, x: Tensor, shift: Tensor) -> Normed:
    """norm(x) + shift; x: (1, tokens, d), shift: (d,)."""

    def at(tokens: slice) -> Tensor:
        made: Tensor = norm(x[:, tokens])
        return made if made.is_meta else made.add_(shift)

    return at


def add_text(streamer: Streamer, block: HunyuanDiTBlock, x: Tensor, text: Tensor, turns: Tensor) -> None:
    """x += cross attention of x (1, n, d) to text (1, T, width), in place. Queries are rotated by their positions; keys
    have none."""
    attn: Any = block.attn2

    def by_head(values: Tensor) -> Tensor:
        return values.unflatten(-1, (attn.heads, -1))

    with streamer.hold(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
        keys = attn.norm_k(by_head(attn.to_k(text))).transpose(1, 2)
        values = by_head(attn.to_v(text)).transpose(1, 2)
        for tokens in each(cut(slice(0, x.shape[1]), CHUNK), x.is_meta):
            queries = attn.norm_q(by_head(attn.to_q(block.norm2(x[:, tokens]))))
            if not queries.is_meta:
                torch.view_as_complex(queries.unflatten(-1, (-1, 2))).mul_(turns[tokens])
            made = attn.to_out[0](attend(queries.transpose(1, 2), keys, values, attn.to_q).transpose(1, 2).flatten(2))
            if not made.is_meta:
                x[:, tokens] += made


def rotation(height: int, width: int, size: int) -> Tensor:
    """(height · width, 1, size / 2) complex: e^iθ of each token, half of the frequencies for its column and half for
    its row. The longer side of a picture has positions from 0 to 32 whatever its size, and the shorter side is centred
    in that range, as in diffusers' get_resize_crop_region_for_grid and get_2d_rotary_pos_embed."""
    longer = max(height, width)
    sides = []
    for count in (height, width):
        length = BASE if count == longer else round(BASE / longer * count)
        first = round((BASE - length) / 2)
        sides.append(torch.linspace(first, (first + length) * (count - 1) / count, count))
    rows, columns = sides
    frequencies = 1.0 / 10_000.0 ** (torch.arange(0, size // 2, 2, dtype=torch.float32) / (size // 2))
    across = torch.outer(columns, frequencies).expand(height, width, -1)
    down = torch.outer(rows, frequencies)[:, None].expand(height, width, -1)
    angles = torch.cat([across, down], dim=-1).flatten(0, 1)
    return torch.polar(torch.ones_like(angles), angles)[:, None]
