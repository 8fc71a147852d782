"""The vocabulary: a byte-level BPE learnt from captions, and a text encoder that is moved to a new one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from model import build_text_encoder
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextModel, CLIPTokenizer


def train_tokenizer(captions: list[str], folder: Path, merges: int = 145) -> CLIPTokenizer:
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


def move_words(old: CLIPTextModel, known: CLIPTokenizer, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The encoder `old`, whose vocabulary is `known`, for another vocabulary: a new piece begins as the mean of
    those that spelt it before."""
    text, state = build_text_encoder(len(tokenizer)), old.state_dict()
    name = next(k for k in state if k.endswith("token_embedding.weight"))
    before, table = state[name], text.state_dict()[name].clone()
    pieces = known.get_vocab()
    for piece, i in tokenizer.get_vocab().items():
        if piece in pieces:
            table[i] = before[pieces[piece]]
            continue
        word = tokenizer.convert_tokens_to_string([piece]).strip()
        spelt = known(word, add_special_tokens=False).input_ids if word else []
        if spelt:
            table[i] = before[torch.tensor(spelt)].mean(0)
    text.load_state_dict({**state, name: table})
    return text
