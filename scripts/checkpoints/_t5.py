"""T5 encoders with random weights, and sentencepiece tokenizers trained on a few sentences."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import make_checkpoint as common
import torch
from checkpoints._files import write_weights

TEXT = """a boat on a lake at dawn, mist over the water, oil on canvas
the old harbour of a small town, fishing boats, gulls, a grey sky
a lighthouse on a cliff, waves, storm clouds, dramatic light, highly detailed
portrait of an old woman with a red scarf, soft window light, shallow depth of field
wide view of a valley in autumn, a river between golden trees, mountains behind
blurry, low quality, watermark, text, deformed hands, cropped, out of frame
a cat asleep on a stack of books beside a lamp, watercolour
city street at night in the rain, neon signs, reflections, 35 mm photograph
"""
XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24, "vocab_size": 32128}
"""The encoder of T5 1.1 XXL, 4.76 B parameters."""
TINY = {"d_model": 256, "d_kv": 32, "d_ff": 384, "num_heads": 8, "num_layers": 3, "vocab_size": 512}


def config(**values: Any) -> dict[str, Any]:
    """A config.json as of T5 1.1; `values` over those of TINY."""
    fixed = {
        "architectures": ["T5EncoderModel"], "decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-06, "model_type": "t5", "pad_token_id": 0, "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": True,
    }  # fmt: skip
    return fixed | TINY | values


def write_encoder(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """An encoder's config.json and its weights, fp16."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model: Any
        if config["model_type"] == "umt5":
            model = UMT5EncoderModel(UMT5Config(**config))
        else:
            model = T5EncoderModel(T5Config(**config))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    common.write_json(folder / "config.json", config)
    write_weights(folder / "model.safetensors", shapes, seed=seed)


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model and no tokenizer.json, as T5's repositories have it: padding 0, end mark 1, unknown 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, vocab_size=160, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {
        "eos_token": "</s>", "extra_ids": 100, "model_max_length": 512, "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    common.write_json(folder / "tokenizer_config.json", settings)
