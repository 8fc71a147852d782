"""How an autoencoder begins when there are no weights to go on from."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from model import LATENT_CHANNELS


@torch.no_grad()
def start_as_pooling(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Initialise the autoencoder as averages and differences of 8×8 blocks, put together again by bilinear
    interpolation.

    It then begins at about 25 dB and trains steadily; from random weights it takes half an hour to come that far.
    `images` (n, 3, H, W) in [-1, 1] give the latents unit variance. Latents: whitened mean colour (3), then the
    brightness differences across the block and their second differences (5). Residual branches start closed. The last
    norms would take brightness and contrast away: two large constant channels ±M keep their variance fixed, and a value
    passes SiLU as silu(x) − silu(−x) = x.
    """
    encoder, decoder, big = vae.encoder, vae.decoder, 20.0
    for module in vae.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()

    def rows(conv: torch.nn.Module, first: int, count: int) -> torch.Tensor:
        conv.weight[first : first + count] = 0
        conv.bias[first : first + count] = 0
        return conv.weight

    def center(conv: torch.nn.Module, out: int, into: int, value: float = 1.0) -> None:
        conv.weight[out, into, conv.kernel_size[0] // 2, conv.kernel_size[0] // 2] = value

    mean, across, down = (torch.tensor(k) / 4 for k in (((1.0, 1), (1, 1)), ((-1.0, 1), (-1, 1)), ((-1.0, -1), (1, 1))))
    rows(encoder.conv_in, 0, 3)
    for i in range(3):
        center(encoder.conv_in, i, i)
    kept = (3, 5, 8)
    for level in range(3):
        conv = encoder.down_blocks[level].downsamplers[0].conv
        weight = rows(conv, 0, kept[level])
        for i in range(3):
            weight[i, i, :2, :2] = mean
            if level:
                weight[3, i, :2, :2], weight[4, i, :2, :2] = across / 3, down / 3
            if level == 2:
                weight[5, i, :2, :2] = across * torch.tensor([[-1.0], [1.0]]) / 3
        if level == 2:
            weight[6, 3, :2, :2], weight[7, 4, :2, :2] = across, down
        shortcut = encoder.down_blocks[level + 1].resnets[0].conv_shortcut
        rows(shortcut, 0, kept[level])
        for i in range(kept[level]):
            center(shortcut, i, i)
    features = images
    for block in (encoder.conv_in, *encoder.down_blocks[:3]):
        features = block(features)
    z = features[:, :LATENT_CHANNELS]
    values, vectors = torch.linalg.eigh(torch.cov(z[:, :3].transpose(0, 1).flatten(1)))
    project = torch.diag(1 / z.std(dim=(0, 2, 3)))
    project[:3, :3] = (vectors / values.sqrt()).T
    offset = -project @ z.mean(dim=(0, 2, 3))
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    rows(shortcut, 0, 18)
    for sign, first in ((1, 0), (-1, LATENT_CHANNELS)):
        shortcut.weight[first : first + LATENT_CHANNELS, :LATENT_CHANNELS, 0, 0] = sign * project
        shortcut.bias[first : first + LATENT_CHANNELS] = sign * offset
    shortcut.bias[16], shortcut.bias[17] = big, -big
    std = big * (2 / 64) ** 0.5  # of the first of two groups over 128 channels
    for norm in (*(r.norm1 for r in encoder.mid_block.resnets), encoder.conv_norm_out):
        norm.weight[:64] = std
    rows(encoder.conv_out, 0, 2 * LATENT_CHANNELS)
    rows(vae.quant_conv, 0, LATENT_CHANNELS)
    rows(vae.post_quant_conv, 0, LATENT_CHANNELS)
    for i in range(LATENT_CHANNELS):
        center(encoder.conv_out, i, i)
        center(encoder.conv_out, i, LATENT_CHANNELS + i, -1.0)
        center(vae.quant_conv, i, i)
        center(vae.post_quant_conv, i, i)

    rows(decoder.conv_in, 0, 3)
    decoder.conv_in.weight[:3, :3, 1, 1] = vectors * values.sqrt()
    decoder.conv_in.bias[:3] = z.mean(dim=(0, 2, 3))[:3]
    tent = torch.tensor([0.25, 0.5, 0.25])
    for level in range(4):
        block = decoder.up_blocks[level]
        if level < 3:
            weight = rows(block.upsamplers[0].conv, 0, 3)
            for i in range(3):
                weight[i, i] = tent[:, None] * tent
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is None:
            continue
        rows(shortcut, 0, 8 if level == 3 else 3)
        for i in range(3):
            center(shortcut, i, i)
            if level == 3:
                center(shortcut, 3 + i, i, -1.0)
    shortcut.bias[6], shortcut.bias[7] = big, -big
    std = big * (2 / 8) ** 0.5  # of the first of two groups over 16 channels
    for norm in (decoder.up_blocks[3].resnets[1].norm1, decoder.conv_norm_out):
        norm.weight[:8] = std
    rows(decoder.conv_out, 0, 3)
    for i in range(3):
        center(decoder.conv_out, i, i)
        center(decoder.conv_out, i, 3 + i, -1.0)
