"""Decoding options that sample and chat share."""

import dataclasses
from typing import Literal

from gptjax.config.rules import no_effect, not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError

LARGEST_BIAS = 10_000
"""Largest absolute value of a logit bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(CheckpointConfig):
    """Choice of tokens, number of tokens, and precision: decoding options that sample and chat share."""

    run_dir: str = ""
    """Run directory of the model."""
    max_new_tokens: int = 256
    """Largest number of new tokens; a sample ends earlier at end-of-text."""
    temperature: float = 1.0
    """Temperature of sampling, which divides the logits; 0: greedy decoding."""
    top_k: int = 0
    """Sample only from this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample only from the smallest set of tokens whose probabilities sum to this (nucleus sampling, arXiv:1904.09751);
    1: all."""
    min_p: float = 0.0
    """Exclude tokens whose probability is below this share of the largest one (arXiv:2407.01082); 0: none."""
    typical_p: float = 1.0
    """Sample only from the most typical tokens whose probabilities sum to this (arXiv:2202.00666); 1: all."""
    repetition_penalty: float = 1.0
    """Repetition penalty: values above 1 make tokens of the prompt and the sample less likely (arXiv:1909.05858); 1:
    none."""
    presence_penalty: float = 0.0
    """Presence penalty, subtracted from the logit of each token that the sample already contains; 0: none."""
    frequency_penalty: float = 0.0
    """Frequency penalty, subtracted from a token's logit for each of its occurrences in the sample; 0: none."""
    logit_bias: tuple[str, ...] = ()
    """Logit biases as TOKEN_ID=VALUE, one or several."""
    min_new_tokens: int = 0
    """Smallest number of new tokens before end-of-text."""
    stop: tuple[str, ...] = ()
    """Stop strings: the sample ends before the first of them."""
    seed: int = 0
    """Random seed of sampling. The same seed gives the same text, independent of other samples."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matmul operands; on a GPU or TPU also of activations and the KV cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantization of weights. int8: 8 bits with a scale per output, faster for one sequence on a CPU; int4: 4 bits
    with a scale per 32 weights."""
    ignore_end_of_text: bool = False
    """Do not end a sample at end-of-text."""
    draft_run_dir: str = ""
    """Run directory of a smaller draft model with the same tokenizer, for speculative decoding; empty: none."""
    draft_ngram: int = 0
    """Speculative decoding without a model: propose the tokens that followed an earlier occurrence of this many newest
    tokens, or of fewer; 0: off."""
    draft_tokens: int = 4
    """Number of tokens that a draft proposes at a time."""

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
        no_effect("", self, "top_k", self.uses_top_k, "temperature above 0")
        for name in ("top_p", "min_p", "typical_p"):
            no_effect("", self, name, self.temperature > 0, "temperature above 0")

    @property
    def uses_top_k(self) -> bool:
        """Whether `top_k` has an effect."""
        return self.temperature > 0

    @property
    def speculates(self) -> bool:
        """Whether a draft proposes tokens."""
        return bool(self.draft_run_dir) or self.draft_ngram > 0


def no_empty_text(config, name: str) -> None:
    """Checks that a list has no empty text.

    Raises:
        UserError: It has; the message names the option.
    """
    if "" in getattr(config, name):
        raise UserError(f"{name} holds an empty text; give at least one character, or leave it out")


def token_biases(options: DecodingConfig) -> dict[int, float]:
    """Parses `logit_bias` to a bias for each token id.

    Raises:
        UserError: An entry is malformed or not finite, or a token occurs twice.
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
