"""Options of the tokenizer."""

import dataclasses
from typing import Literal

from gptjax.config.rules import no_effect
from gptjax.errors import UserError, did_you_mean

TIKTOKEN_NAMES = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The tokenizer, which converts text to token ids."""

    kind: Literal["bytes", "chars", "tiktoken", "bpe", "wordpiece"] = "tiktoken"
    """Kind of tokenizer. bytes: UTF-8 bytes; chars: characters of the corpus; tiktoken: a published encoding; bpe and
    wordpiece: trained on the corpus."""
    name: str = "gpt2"
    """Encoding for kind tiktoken: gpt2, r50k_base, p50k_base, cl100k_base or o200k_base."""
    vocab_size: int = 4096
    """Vocabulary size of kinds bpe and wordpiece, including single bytes and <|endoftext|>."""
    sample_fraction: float = 1.0
    """Share of the documents on which kinds bpe and wordpiece are trained, chosen by the hash of their text."""

    def __post_init__(self):
        if self.kind == "tiktoken" and self.name not in TIKTOKEN_NAMES:
            raise UserError(
                f"tokenizer.name={self.name!r} must be one of {', '.join(TIKTOKEN_NAMES)}."
                f"{did_you_mean(self.name, TIKTOKEN_NAMES)}"
            )
        if self.vocab_size < 257:
            raise UserError(f"tokenizer.vocab_size={self.vocab_size} must be at least 257: 256 bytes and <|endoftext|>")
        no_effect("tokenizer", self, "name", self.kind == "tiktoken", "tokenizer.kind=tiktoken")
        learned = self.kind in ("bpe", "wordpiece")
        for name in ("vocab_size", "sample_fraction"):
            no_effect("tokenizer", self, name, learned, "tokenizer.kind=bpe or wordpiece")
        if not 0 < self.sample_fraction <= 1:
            raise UserError(f"tokenizer.sample_fraction={self.sample_fraction} must lie in (0, 1]")

    @property
    def identity(self) -> dict[str, object]:
        """What names prepared data. An option that came later counts only where it is set."""
        options = dataclasses.asdict(self)
        if self.sample_fraction == 1:
            del options["sample_fraction"]
        return options
