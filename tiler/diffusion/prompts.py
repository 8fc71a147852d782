"""The encoded prompts of a run, and the selection of prompts for each step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tiler.diffusion.runner import Conditions, Share
from tiler.models.family import Family
from tiler.models.samples import Prompt
from tiler.request.wording import Said, Wording


class Prompts:
    """Encoded texts of a family; None is a negative prompt that was not given. Where prompts may have several chunks,
    "" must be among them."""

    def __init__(self, family: Family, encoded: Mapping[str | None, Prompt]) -> None:
        self._family, self.encoded = family, encoded
        # Equal prompts are one object: families know them by their tensors.
        self._lengthened: dict[tuple[str | None, int], Prompt] = {}

    def conditions(self, wording: Wording, step: int) -> Conditions:
        """The conditions at `step` of a stage, from 0."""
        cond, uncond = [], []
        for said in wording.at(step):
            tokens = self._tokens(said)
            cond.append([Share(self._prompt(text, tokens), factor) for text, factor in said.prompts])
            uncond.append(self._prompt(said.negative, tokens))
        return Conditions(cond, uncond)

    def all_of(self, wordings: Iterable[Wording]) -> list[Prompt]:
        """Every prompt that occurs at a step of these stages, each once."""
        said = (one for wording in wordings for step in range(wording.stage.steps) for one in wording.at(step))
        needed = dict.fromkeys((text, self._tokens(one)) for one in dict.fromkeys(said) for text in one.texts)
        return [self._prompt(*key) for key in needed]

    def _tokens(self, said: Said) -> int:
        """The number of tokens of the longest among the prompts that share a sample's latents."""
        return max(self.encoded[text].tokens.shape[1] for text in said.texts)

    def _prompt(self, text: str | None, tokens: int) -> Prompt:
        prompt = self.encoded[text]
        if not self._family.traits.chunked or prompt.tokens.shape[1] == tokens:
            return prompt
        if (text, tokens) not in self._lengthened:
            self._lengthened[text, tokens] = self._family.lengthened(prompt, tokens, self.encoded[""])
        return self._lengthened[text, tokens]
