"""Texts of a given form: which tokens a regular expression or a JSON schema allows next.

Shape suffixes: V vocabulary.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from gptjax.errors import UserError
from gptjax.text.tokenizers.base import Tokenizer

NO_PACKAGE = "regex and response_format need llguidance; install it with pip install 'gptjax[constrain]'"


@dataclasses.dataclass(frozen=True)
class Form:
    """What a text must be: one of the two is given."""

    regex: str = ""
    """Regular expression that matches the whole text."""
    schema: dict[str, Any] | None = None
    """JSON schema of the text, which is compact JSON."""

    def grammar(self, before: str) -> str:
        """A grammar of llguidance for `before` and a text of this form."""
        start = f"start: {json.dumps(before)} body" if before else "start: body"
        if self.schema is not None:
            compact = {"x-guidance": {"whitespace_flexible": False}} | self.schema
            return f"{start}\nbody: %json {json.dumps(compact)}"
        escaped = self.regex.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n")
        return f"{start}\nbody: /{escaped}/"


class Constraint:
    """The state of one text that is written under a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> np.ndarray:
        """Tokens that may follow, bool `[V]`; end-of-text where the text may end, none where it must and there is no
        such token.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def add(self, tokens: list[int]) -> None:
        """Takes tokens that were chosen among those allowed; end-of-text is not added."""
        self._matcher.consume_tokens(tokens)


class Constrainer:
    """Makes constraints for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        """See the class.

        Raises:
            UserError: llguidance is missing.
        """
        try:
            import llguidance
        except ImportError:
            raise UserError(NO_PACKAGE) from None
        self._vocab_size = tokenizer.vocab_size
        self._llguidance, self._tokenizer = llguidance, _wrapped(llguidance, tokenizer)

    def check(self, form: Form, before: str = "") -> None:
        """Refuses a form that is malformed or too large.

        Raises:
            UserError: It is.
        """
        problem = self._llguidance.LLMatcher.validate_grammar(form.grammar(before), self._tokenizer)
        if problem:
            name = "regex" if form.schema is None else "response_format"
            message, _, _ = " ".join(str(problem).split()).partition(" 1 | start:")
            raise UserError(f"{name}: {message[:300]}")

    def make(self, form: Form, before: str = "") -> Constraint:
        """A constraint for a text that is written after `before`."""
        matcher = self._llguidance.LLMatcher(self._tokenizer, form.grammar(before), log_level=0)
        return Constraint(matcher, self._vocab_size)


def _wrapped(llguidance: Any, tokenizer: Tokenizer) -> Any:
    """The tokenizer as llguidance reads it; without an end-of-text token, an id behind the vocabulary stands for it."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    end = tokenizer.end_of_text
    special = [] if end is None else [end]
    if end is None:
        end, tokens = len(tokens), [*tokens, b"<end>"]
        special = [end]

    class Source:
        eos_token_id, bos_token_id, special_token_ids = end, None, special

        def __init__(self):
            self.tokens = tokens

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text).tolist()

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Source()))
