"""Constrained decoding: the tokens that a regular expression or a JSON schema allows next.

Shape suffixes: V vocabulary.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.controls import BANNED
from gptjax.text.tokenizers.base import Tokenizer

NO_PACKAGE = "regex and JSON schemas need llguidance; install it with pip install 'gptjax[constrain]'"


@dataclasses.dataclass(frozen=True)
class Form:
    """The required form of a text; exactly one of the two fields is set."""

    regex: str = ""
    """Regular expression that matches the whole text."""
    schema: dict[str, Any] | None = None
    """JSON schema. The text is JSON without whitespace."""

    def grammar(self, before: str) -> str:
        """The llguidance grammar of `before` followed by a text of this form."""
        start = f"start: {json.dumps(before)} body" if before else "start: body"
        if self.schema is not None:
            compact = {"x-guidance": {"whitespace_flexible": False}} | self.schema
            return f"{start}\nbody: %json {json.dumps(compact)}"
        # A slash ends the expression in a grammar, unless it is escaped, which it may be already.
        # A line feed is not allowed in one.
        special = {"/": "\\/", "\n": "\\n", "\\\n": "\\n"}
        escaped = re.sub(r"\\.|[/\n]", lambda found: special.get(found[0], found[0]), self.regex, flags=re.DOTALL)
        return f"{start}\nbody: /{escaped}/"


class Constraint:
    """The state of one text that is generated under a grammar."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> np.ndarray:
        """Allowed next tokens, bool `[V]`. They include end-of-text if the text may end. If the text must end but the
        tokenizer has no end-of-text token, no token is allowed.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def biases(self, bias_V: np.ndarray) -> np.ndarray | None:
        """A bias of each token that also bans those that may not follow, float32 `[V]`; None: none may."""
        allowed_V = self.allowed()
        return np.where(allowed_V, bias_V, np.float32(BANNED)) if allowed_V.any() else None

    def add(self, tokens: list[int]) -> None:
        """Adds chosen tokens, which must be allowed; end-of-text must not be added."""
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
        """Checks a form.

        Raises:
            UserError: The form is malformed or too large.
        """
        problem = self._llguidance.LLMatcher.validate_grammar(form.grammar(before), self._tokenizer)
        if problem:
            name = "regex" if form.schema is None else "JSON schema"
            message, _, _ = " ".join(str(problem).split()).partition(" 1 | start:")
            raise UserError(f"{name}: {message[:300]}")

    def make(self, form: Form, before: str = "") -> Constraint:
        """A constraint for a text that follows `before`."""
        matcher = self._llguidance.LLMatcher(self._tokenizer, form.grammar(before), log_level=0)
        return Constraint(matcher, self._vocab_size)


@functools.lru_cache(maxsize=1)
def constrainer_of(tokenizer: Tokenizer) -> Constrainer:
    """The constrainer of a tokenizer, which is made once: it reads the whole vocabulary.

    Raises:
        UserError: llguidance is missing.
    """
    return Constrainer(tokenizer)


def make_constraints(tokenizer: Tokenizer, options: SampleConfig, rows: int) -> list[Constraint]:
    """A constraint for each row, where `regex` or `json_schema` asks for one.

    Raises:
        UserError: The regular expression or the schema is malformed or cannot be read, or llguidance is missing.
    """
    if not (options.regex or options.json_schema):
        return []
    form = Form(options.regex, read_schema(options.json_schema) if options.json_schema else None)
    constrainer = constrainer_of(tokenizer)
    constrainer.check(form)
    return [constrainer.make(form) for _ in range(rows)]


def read_schema(path: str) -> dict[str, Any]:
    """The JSON schema of a file.

    Raises:
        UserError: It cannot be read, or holds no object.
    """
    try:
        schema = json.loads(Path(path).expanduser().read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"json_schema={path}: cannot be read: {error}") from None
    if not isinstance(schema, dict):
        raise UserError(f'json_schema={path}: must hold a JSON object, such as {{"type": "object"}}')
    return schema


def _wrapped(llguidance: Any, tokenizer: Tokenizer) -> Any:
    """The tokenizer for llguidance. If it has no end-of-text token, the first id after the vocabulary is used for
    it.
    """
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
