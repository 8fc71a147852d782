"""The parts of `mini`, untrained, in Stable Diffusion's own classes and file layout. Knows nothing of training."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 8
NATIVE = 256  # px
POSTERIOR_STD = 0.03  # of unit-variance latents


def build_vae() -> AutoencoderKL:
    """2.6 M parameters, factor 8. The encoder's log-variance is a constant: the posterior is N(mean, 0.03²)."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=2,
        sample_size=NATIVE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    with torch.no_grad():
        head = vae.quant_conv
        head.weight[LATENT_CHANNELS:] = 0
        head.bias[LATENT_CHANNELS:] = 2 * torch.log(torch.tensor(POSTERIOR_STD))
    return vae


@torch.no_grad()
def start_as_pooling(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Initialise the autoencoder as averages and differences of 8×8 blocks, put together again by bilinear interpolation.

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


def build_unet() -> UNet2DConditionModel:
    """6.1 M parameters; native 32×32 latents; cross-attention on the two lower levels."""
    return UNet2DConditionModel(
        sample_size=NATIVE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 144),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=192,
        attention_head_dim=(1, 2, 3),  # the number of heads, as in SD 2.x configs
        norm_num_groups=16,
        use_linear_projection=True,
    )


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """2 layers × 192, 77 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=77,
            projection_dim=192,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891): dark and bright pictures both work."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train_tokenizer(captions: list[str], folder: Path, merges: int = 400) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format: every Unicode text falls apart into known pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + merges, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = [
        tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    pieces = alphabet + [c + "</w>" for c in alphabet] + ["".join(m) for m in learnt]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in learnt) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)
