"""Interpret the keys of a LoRA file: the module that each tensor belongs to, and its role there.

Trainers spell keys in four ways: kohya's and LyCORIS' (`lora_unet_mid_block_….lora_down.weight`), PEFT's
(`….lora_A.weight`), and two older ones of diffusers'. Kinds and their keys: LyCORIS, docs of
https://github.com/KohakuBlueleaf/LyCORIS. Knows no module.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from tiler.errors import ModelError
from tiler.weights.index import TensorInfo


class Slot(StrEnum):
    """The role of a tensor in its module's change."""

    DOWN = "down"  # LoRA, LoCon: (rank, in, *taps)
    UP = "up"  # (out, rank)
    MID = "mid"  # Tucker: (rank, rank, *taps), with `down` (rank, in)
    W1 = "w1"  # LoKr, whole
    W2 = "w2"
    W1_A = "w1_a"  # LoHa, LoKr: a factor is w_a · w_b
    W1_B = "w1_b"
    W2_A = "w2_a"
    W2_B = "w2_b"
    T1 = "t1"  # Tucker
    T2 = "t2"
    DIFF = "diff"  # the difference itself, of a weight
    DIFF_BIAS = "diff_b"  # of a bias
    ALPHA = "alpha"
    DORA = "dora_scale"


class Kind(StrEnum):
    """How a module's difference is computed from its tensors."""

    LORA = "LoRA"
    LOHA = "LoHa"
    LOKR = "LoKr"
    FULL = "full difference"


class Tensors(NamedTuple):
    """The tensors of a module. `magnitude_of_rows`: its DoRA norms are known to be norms of rows, as in PEFT."""

    by_slot: dict[Slot, TensorInfo]
    keys: list[str]
    loha: bool = False
    magnitude_of_rows: bool = False


_SUFFIXES: Mapping[str, Slot] = {
    **{f".lora_down{middle}.weight": Slot.DOWN for middle in ("", ".default")},
    **{f".lora_up{middle}.weight": Slot.UP for middle in ("", ".default")},
    ".lora_mid.weight": Slot.MID,
    **{f".lora_A{middle}.weight": Slot.DOWN for middle in ("", ".default", ".default_0")},
    **{f".lora_B{middle}.weight": Slot.UP for middle in ("", ".default", ".default_0")},
    ".lora.down.weight": Slot.DOWN, ".lora.up.weight": Slot.UP,
    "_lora.down.weight": Slot.DOWN, "_lora.up.weight": Slot.UP,
    ".lora_linear_layer.down.weight": Slot.DOWN, ".lora_linear_layer.up.weight": Slot.UP,
    ".hada_w1_a": Slot.W1_A, ".hada_w1_b": Slot.W1_B, ".hada_w2_a": Slot.W2_A, ".hada_w2_b": Slot.W2_B,
    ".hada_t1": Slot.T1, ".hada_t2": Slot.T2,
    ".lokr_w1": Slot.W1, ".lokr_w1_a": Slot.W1_A, ".lokr_w1_b": Slot.W1_B,
    ".lokr_w2": Slot.W2, ".lokr_w2_a": Slot.W2_A, ".lokr_w2_b": Slot.W2_B, ".lokr_t2": Slot.T2,
    ".diff": Slot.DIFF, ".w_norm": Slot.DIFF, ".diff_b": Slot.DIFF_BIAS, ".b_norm": Slot.DIFF_BIAS,
    ".alpha": Slot.ALPHA, ".dora_scale": Slot.DORA,
    **{f".lora_magnitude_vector{ending}": Slot.DORA for ending in ("", ".weight", ".default", ".default.weight")},
}  # fmt: skip
_LONGEST_FIRST = sorted(_SUFFIXES, key=len, reverse=True)
_REFUSED: Mapping[str, str] = {
    ".on_input": "IA³", ".a1.weight": "GLoRA", ".b1.weight": "GLoRA", ".oft_blocks": "OFT", ".oft_diag": "OFT",
    ".oft_R.weight": "OFT", ".boft_R": "BOFT", ".vera_lambda_b": "VeRA",
    ".qkv_lora1.down.weight": "LoRA in XLabs' layout", ".hada_w1": "ABBA", "ip_adapter": "IP-Adapter",
    "controlnet_blocks": "ControlNet",
}  # fmt: skip
_NOT_LORA: Mapping[str, str] = {
    "emb_params": "a textual inversion embedding, which prompts name; put it into --embd-dir",
    "model.diffusion_model.input_blocks.0.0.weight": "a checkpoint; give it as --model",
    "conv_in.weight": "a model; give its folder as --model",
    "first_stage_model.decoder.conv_in.weight": "an autoencoder; give it as --vae",
}


def read_keys(path: Path, index: Mapping[str, TensorInfo]) -> tuple[dict[str, Tensors], list[str]]:
    """The tensors of each module by its name in the file, and the keys that do not belong to a LoRA. Raises ModelError
    for files of other kinds."""
    modules: dict[str, Tensors] = {}
    others = []
    for key, info in index.items():
        if key in _NOT_LORA:
            raise ModelError(f"{path}: this is {_NOT_LORA[key]}")
        suffix = next((suffix for suffix in _LONGEST_FIRST if key.endswith(suffix)), None)
        if suffix is None:
            if (kind := next((kind for ending, kind in _REFUSED.items() if ending in key), None)) is not None:
                raise ModelError(f"{path}: {key!r} is of a kind that tiler does not apply ({kind}); use another file")
            others.append(key)
            continue
        module, slot = key.removesuffix(suffix), _SUFFIXES[suffix]
        known = modules.setdefault(module, Tensors({}, []))
        if slot in known.by_slot:
            raise ModelError(
                f"{path}: {module!r} has two tensors for {slot}; the file holds two LoRAs, take one of them"
            )
        known.by_slot[slot] = info
        known.keys.append(key)
        loha, rows = known.loha or ".hada_" in suffix, known.magnitude_of_rows or "magnitude" in suffix
        modules[module] = known._replace(loha=loha, magnitude_of_rows=rows)
    return modules, others


def kind_of(path: Path, name: str, tensors: Tensors) -> Kind | None:
    """The kind of change to the module's weight; None if only its bias changes, or nothing. Raises ModelError for
    tensors that do not fit together."""
    slots = tensors.by_slot.keys() - {Slot.ALPHA, Slot.DORA, Slot.DIFF_BIAS}
    if not slots:
        return None
    if {Slot.DOWN, Slot.UP} <= slots <= {Slot.DOWN, Slot.UP, Slot.MID}:
        return Kind.LORA
    if slots == {Slot.DIFF}:
        return Kind.FULL
    pairs = {Slot.W1_A, Slot.W1_B, Slot.W2_A, Slot.W2_B}
    if tensors.loha and slots in (pairs, pairs | {Slot.T1, Slot.T2}):
        return Kind.LOHA
    first = {Slot.W1} <= slots or {Slot.W1_A, Slot.W1_B} <= slots
    second = {Slot.W2} <= slots or {Slot.W2_A, Slot.W2_B} <= slots
    if not tensors.loha and first and second:
        return Kind.LOKR
    raise ModelError(f"{path}: {name!r} has only {', '.join(sorted(slots))}; the file is incomplete, download it again")
