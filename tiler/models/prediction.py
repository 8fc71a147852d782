"""Whether a UNet predicts noise or velocity. Its shapes do not say so; keys, metadata, a yaml file or a bias do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch

from tiler.errors import ModelError
from tiler.models.kinds import SD2, FamilyRow
from tiler.models.part_files import WeightFile
from tiler.request.model import Prediction
from tiler.weights.store import WeightStore

_DEVIATION = 0.09  # of a bias of Stable Diffusion 2: above it the model predicts v (comfyanonymous/ComfyUI, SD20)
_BIASES = (
    "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
)
_REFUSED = {"edm_mean": "Playground 2.5", "edm_vpred.sigma_max": "CosXL"}
_MAX_YAML = 100_000
_V = re.compile(r"parameterization:\s*[\"']?v\b|VScaling")


class Decided(NamedTuple):
    """The prediction of a UNet, the evidence for it, and whether its first step starts from pure noise. `known` if the
    file itself states it."""

    prediction: Prediction
    why: str
    zero_snr: bool = False
    known: bool = True


def decide(file: WeightFile, row: FamilyRow, said: Prediction | None) -> Decided:
    """Decide for the UNet in `file`; `said` is the user's choice. Raises ModelError for models with another definition
    of noise."""
    names = file.index
    for key, what in _REFUSED.items():
        if key in names:
            raise ModelError(
                f"{file.path}: its key {key} says that this is {what}, which is trained on a noise of its own (EDM); tiler "
                "does not support it"
            )
    zero_snr = "ztsnr" in names
    if said is not None:
        return Decided(said, "as --prediction says", zero_snr and said is Prediction.V)
    if "v_pred" in names:
        return Decided(Prediction.V, "it holds the key v_pred" + (" and ztsnr" if zero_snr else ""), zero_snr)
    if (found := _by_words(file.words)) is not None:
        return found
    if (yaml := file.path.with_suffix(".yaml")).is_file() and yaml.stat().st_size < _MAX_YAML:
        if _V.search(yaml.read_text(errors="replace")):
            return Decided(Prediction.V, f"{yaml.name} beside it says so")
        return Decided(Prediction.EPSILON, f"{yaml.name} beside it does not say v")
    bias = next((name for name in _BIASES if name in names), None)
    if row is SD2 and bias is not None:
        with WeightStore({"bias": names[bias]}) as store:
            deviation = float(torch.std(store.load("bias"), correction=0))
        what = Prediction.V if deviation > _DEVIATION else Prediction.EPSILON
        return Decided(what, f"told by the deviation {deviation:.3f} of a bias")
    return Decided(Prediction.EPSILON, "as models of this family do", known=False)


def _by_words(words: Mapping[str, str]) -> Decided | None:
    """Decide by the file's own header (Stability-AI/ModelSpec; ComfyUI writes predict_key)."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = str(words.get(key, "")).lower()
        if value in ("v", "v_prediction", "velocity"):
            return Decided(Prediction.V, f"its header says {key} = {value}")
        if value in ("epsilon", "eps", "noise"):
            return Decided(Prediction.EPSILON, f"its header says {key} = {value}")
    return None
