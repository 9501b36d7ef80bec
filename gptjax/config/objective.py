"""Options of the pretraining objective."""

import dataclasses
from typing import Literal

from gptjax.config.rules import fraction, no_effect
from gptjax.errors import UserError

SENTINELS = 100
"""Spans of one document that can be replaced, as in T5."""
FILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MASK = "<|mask|>"
MODES = ("<|mode_r|>", "<|mode_x|>", "<|mode_s|>")
NEXT = ("<|next|>", "<|other|>")
SPANS = tuple(f"<|extra_{number}|>" for number in range(SENTINELS))
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "fill_in_the_middle": FILL,
    "masked": (MASK,),
    "permutation": (MASK,),
    "span_corruption": SPANS,
    "ul2": (*SPANS, *MODES),
}
"""Special tokens that an objective adds to the run's tokenizer, whatever its options; no text encodes to them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The pretraining objective: which tokens are predicted from which."""

    kind: Literal[
        "causal",
        "backward",
        "fill_in_the_middle",
        "prefix",
        "multi_token",
        "masked",
        "permutation",
        "span_corruption",
        "ul2",
    ] = "causal"
    """causal: each token from those before it; backward: from those after it; fill_in_the_middle (arXiv:2207.14255);
    prefix: a bidirectional prefix, loss on the rest (arXiv:1910.10683, section 3.2.1); multi_token (arXiv:2404.19737);
    masked (BERT, arXiv:1810.04805); permutation (XLNet, arXiv:1906.08237); span_corruption (T5, arXiv:1910.10683); ul2
    (arXiv:2205.05131)."""
    rate: float = 0.15
    """Share of a document's tokens that masked, permutation and span_corruption predict."""
    whole_words: bool = False
    """For kind masked: mask all tokens of a word together."""
    next_sentence: bool = False
    """For kind masked: also predict, at the start of a text, whether its second part follows the first one in the data;
    in half of the texts it is from another place (BERT's next-sentence prediction)."""
    span_length: float = 3.0
    """For kind span_corruption: mean number of tokens in a span."""
    fill_rate: float = 0.5
    """Share of documents that fill_in_the_middle rearranges; the others are predicted from left to right."""
    suffix_first: float = 0.5
    """Share of the rearranged documents with the suffix before the prefix (SPM); the others have it after (PSM)."""
    ahead: int = 4
    """Tokens that multi_token predicts at each position."""

    def __post_init__(self):
        section = "task.objective"
        fraction(section, self, "rate")
        for name in ("fill_rate", "suffix_first"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{section}.{name}={getattr(self, name)} must lie in [0, 1]")
        if not self.rate:
            raise UserError(f"{section}.rate={self.rate} leaves no target; it must lie between 0 and 1")
        if self.span_length < 1:
            raise UserError(f"{section}.span_length={self.span_length} must be at least 1")
        if self.ahead < 2:
            raise UserError(f"{section}.ahead={self.ahead} must be at least 2; kind=causal predicts one token")
        for kinds, names in {
            ("masked", "permutation", "span_corruption"): ("rate",),
            ("masked",): ("whole_words", "next_sentence"),
            ("span_corruption",): ("span_length",),
            ("fill_in_the_middle",): ("fill_rate", "suffix_first"),
            ("multi_token",): ("ahead",),
        }.items():
            needs = f"{section}.kind={', '.join(kinds[:-1])}{' or ' if kinds[:-1] else ''}{kinds[-1]}"
            for name in names:
                no_effect(section, self, name, self.kind in kinds, needs)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that the objective adds to the run's tokenizer."""
        return (*SPECIAL_TOKENS.get(self.kind, ()), *(NEXT if self.next_sentence else ()))

    @property
    def rearranges(self) -> bool:
        """Whether batches differ from windows of the text with the next token as target."""
        return self.kind not in ("causal", "multi_token")

    @property
    def has_prefix(self) -> bool:
        """Whether all tokens of a document attend to a part of it."""
        return self.kind in ("prefix", "span_corruption", "ul2")

    @property
    def measures_text(self) -> bool:
        """Whether every token of the text has a loss, so that bits per byte are defined."""
        return self.kind in ("causal", "multi_token", "backward")

    @property
    def why_no_sample(self) -> str:
        """The reason why a model of this objective cannot continue text; empty if it can."""
        return {
            "backward": "it predicts the token before, not the next one",
            "masked": "it predicts tokens from both sides",
            "permutation": "it predicts tokens at positions that are given",
            "span_corruption": "it predicts spans that were removed",
            "ul2": "it predicts spans that were removed",
        }.get(self.kind, "")
