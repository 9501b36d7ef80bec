"""Options that sample and chat share: how tokens are chosen."""

import dataclasses
from typing import Literal

from gptjax.config.rules import no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError

LARGEST_BIAS = 10_000
"""Largest absolute value of a bias of logits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(CheckpointConfig):
    """How tokens are chosen, how many, and in which precision: options that sample and chat share."""

    run_dir: str = ""
    """Run directory of the model."""
    max_new_tokens: int = 256
    """Largest number of new tokens; a sample ends earlier at end-of-text."""
    temperature: float = 1.0
    """Divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities sum to this (nucleus sampling, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Leave out tokens whose probability is below this share of the largest one (arXiv:2407.01082)."""
    typical_p: float = 1.0
    """Sample among the most typical tokens whose probabilities sum to this (arXiv:2202.00666)."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that prompt or sample already have become less likely (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the sample already has."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the sample already has it."""
    logit_bias: tuple[str, ...] = ()
    """Added to logits: TOKEN_ID=VALUE, one or several."""
    min_new_tokens: int = 0
    """End-of-text is not chosen before this many new tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; the sample is cut before them."""
    seed: int = 0
    """Random seed; the same seed gives the same text, whatever else is in the batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands; on a GPU or TPU also of activations and the cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """int8: 8 bits a weight, a scale for each output, faster for one sequence on a CPU; int4: 4, one for each 32."""
    ignore_end_of_text: bool = False
    """Continue after end-of-text."""
    draft_run_dir: str = ""
    """Run directory of a smaller model with the same tokenizer, whose proposals are checked (speculative decoding)."""
    draft_ngram: int = 0
    """Propose the tokens that followed an earlier occurrence of this many newest tokens, or of fewer; 0: off."""
    draft_tokens: int = 4
    """Tokens that a draft proposes at a time."""

    def __post_init__(self):
        super().__post_init__()
        usable_paths("", self, "run_dir", "draft_run_dir")
        positive("", self, "draft_tokens")
        not_negative("", self, "draft_ngram")
        if self.draft_run_dir and self.draft_ngram:
            raise UserError(
                f"draft_run_dir={self.draft_run_dir} and draft_ngram={self.draft_ngram} are both set; give one"
            )
        no_effect("", self, "draft_tokens", self.speculates, "draft_run_dir or draft_ngram")
        positive("", self, "max_new_tokens")
        not_negative("", self, "temperature", "top_k", "min_new_tokens")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} must lie in [0, 2**32)")
        if 0 < self.temperature < 1e-3:
            raise UserError(f"temperature={self.temperature} must be 0 (the most likely token) or at least 0.001")
        for name in ("top_p", "typical_p"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p} must lie in [0, 1]")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 changes nothing")
        no_empty_text(self, "stop")
        token_biases(self)
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )
        no_effect("", self, "min_new_tokens", not self.ignore_end_of_text, "ignore_end_of_text=false")
        for name in ("top_k", "top_p", "min_p", "typical_p"):
            no_effect("", self, name, self.temperature > 0, "temperature above 0")

    @property
    def speculates(self) -> bool:
        """Whether a draft proposes tokens."""
        return bool(self.draft_run_dir) or self.draft_ngram > 0


def no_empty_text(config, name: str) -> None:
    """Refuses a list with an empty text.

    Raises:
        UserError: Naming the option.
    """
    if "" in getattr(config, name):
        raise UserError(f"{name} holds an empty text; give at least one character, or leave it out")


def token_biases(options: DecodingConfig) -> dict[int, float]:
    """The bias of each token id that `logit_bias` names.

    Raises:
        UserError: An entry has another form, is not finite, or names a token twice.
    """
    biases: dict[int, float] = {}
    for entry in options.logit_bias:
        token, _, value = entry.partition("=")
        try:
            number, bias = int(token), float(value)
        except ValueError:
            raise UserError(f"logit_bias: {entry!r} must be TOKEN_ID=VALUE, such as 50256=-5") from None
        if number < 0 or not abs(bias) <= LARGEST_BIAS:
            raise UserError(
                f"logit_bias: {entry!r} needs an id from 0 on and a value in [-{LARGEST_BIAS}, {LARGEST_BIAS}]"
            )
        if number in biases:
            raise UserError(f"logit_bias: token {number} is given twice")
        biases[number] = bias
    return biases
