"""Options of tokenizer."""

import dataclasses

from gptjax.config.data import DataConfig
from gptjax.config.rules import no_effect, not_negative, positive, usable_paths
from gptjax.config.tokenizer import TIKTOKEN_NAMES
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerVerbConfig(CheckpointConfig):
    """Measures tokenizers on text, or makes a run with a larger or smaller vocabulary."""

    compare: tuple[str, ...] = ()
    """Published encodings to measure beside this tokenizer (gpt2 cl100k_base o200k_base); they are downloaded once."""
    characters: int = 10_000_000
    """Read this many characters of each entry of data.path; 0: all."""
    languages: bool = False
    """Divide each source by language (extra clean)."""
    show: int = 10
    """Unused and longest tokens to print."""
    extend: int = 0
    """Learn this many new tokens from the text, and write a run that has them."""
    prune: int = 0
    """Keep this many tokens, those that the text uses most, and write a run with them."""
    to: str = ""
    """Run directory to make, of extend and prune."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        super().__post_init__()
        usable_paths("", self, "to")
        not_negative("", self, "characters", "extend", "prune")
        positive("", self, "show")
        for name in ("validation_fraction", "skip", "packing", "attend_across_documents", "verify", "license"):
            no_effect("data", self.data, name, False, "a text to train on")
        if not (self.data.path or self.data.source or self.data.hf_dataset):
            raise UserError("no text: name files as --data.path")
        if self.extend and self.prune:
            raise UserError("give --extend or --prune, not both")
        changes = bool(self.extend or self.prune)
        if changes != bool(self.to):
            raise UserError("--extend and --prune need --to, a run directory to make, and --to needs one of them")
        for name in ("checkpoint", "strict", "base"):
            no_effect("", self, name, changes, "extend or prune")
        for name in ("compare", "languages", "show"):
            no_effect("", self, name, not changes, "a report: leave out extend and prune")
        for name in self.compare:
            if name not in TIKTOKEN_NAMES:
                raise UserError(
                    f"compare={name!r} must be one of {', '.join(TIKTOKEN_NAMES)}.{did_you_mean(name, TIKTOKEN_NAMES)}"
                )
