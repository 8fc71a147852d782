"""The parts of `mini`, untrained, in Stable Diffusion's own classes and file layout. Knows nothing of training."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

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
    fix_variance(vae)
    return vae


@torch.no_grad()
def fix_variance(vae: AutoencoderKL) -> None:
    """Make the encoder's log-variance, the second half of `quant_conv`, the constant that it is by design."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


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


def build_scheduler() -> EulerAncestralDiscreteScheduler:
    """v-prediction with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891): dark and bright pictures both work.

    The scheduler adds fresh noise after each step, so later steps can mend the shape of a disc. Without it, a lump left
    by an early step stays.
    """
    return EulerAncestralDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        steps_offset=1,
        timestep_spacing="trailing",
    )
