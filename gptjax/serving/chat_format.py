"""Chat templates of runs: converts messages to the prompt's token ids, and finds the end of an answer."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.errors import UserError
from gptjax.tasks.instruct import chat_template
from gptjax.text.chats import ASSISTANT, USER, Message, render_prompt
from gptjax.text.tokenizers.base import Tokenizer

SYSTEM = "system"
LARGEST_TEMPLATE = 2**18
LARGEST_TEXT = 2**24
MOST_ROUNDS = 100_000
LARGEST_FACTOR = 2**31
"""Limits of a Jinja template, far above the needs of published models."""


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The chat format of one run."""

    encode: Callable[[Sequence[Message]], np.ndarray]
    """Encodes messages to token ids, up to the start of the answer."""
    stops: tuple[str, ...]
    """Stop strings, in addition to end-of-text: the template's text after an answer or before the next message."""
    header_end: str
    """The end of the header, if the model generates it before an answer; see `chats.render_prompt`."""


class AnswerFilter:
    """Removes template text from an answer that arrives in pieces: `header_end`, and white space at the end."""

    def __init__(self, format: ChatFormat):
        self._head, self._held = format.header_end, ""

    def feed(self, piece: str, final: bool = False) -> str:
        """Returns the new text that is certain."""
        text = self._held + piece
        if self._head:
            if self._head.startswith(text) and not final:
                self._held = text
                return ""
            text, self._head = text.removeprefix(self._head), ""
        end = len(text.rstrip())
        self._held = text[end:]
        return text[:end]


def chat_format(run: LoadedRun) -> ChatFormat | None:
    """The chat format of a run; None if it was not trained on chats.

    The template of an imported model has priority over `task.template`.

    Raises:
        UserError: The run has several templates, or its template is invalid.
    """
    tokenizer = run.tokenizer
    if tokenizer is None:
        return None
    if run.chat_template:
        return _jinja_format(run.chat_template, tokenizer)
    template = chat_template(run.config)
    return None if template is None else _template_format(template, tokenizer)


def _template_format(template: str, tokenizer: Tokenizer) -> ChatFormat:
    before, after = template.split("{content}")
    written = render_prompt([], template)
    first = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]

    def encode(messages: Sequence[Message]) -> np.ndarray:
        ids = tokenizer.encode(render_prompt(messages, template))
        return np.concatenate([np.array(first, np.int32), ids])

    stops = [after.replace("{role}", ASSISTANT).strip()]
    if not stops[0]:  # only white space, which can also occur inside an answer
        stops = [f"{after}{before.replace('{role}', role)}".rstrip() for role in (USER, ASSISTANT, SYSTEM)]
    header_end = before.replace("{role}", ASSISTANT).removeprefix(written)
    return ChatFormat(encode, tuple(dict.fromkeys(filter(str.strip, stops))), header_end)


def _jinja_format(source: str, tokenizer: Tokenizer) -> ChatFormat:
    render, special = compile_template(source), tokenizer.special_tokens

    def encode(messages: Sequence[Message]) -> np.ndarray:
        for message in messages:
            for name in special:
                if name in message.content:
                    raise UserError(f"a message contains {name}, which is reserved for the chat template; leave it out")
        return tokenizer.encode_with_special(render(messages, tokenizer.end_token))

    ends = tuple(name for name in special if name != tokenizer.end_token)
    return ChatFormat(encode, ends, "")


def compile_template(source: str) -> Callable[[Sequence[Message], str], str]:
    """Returns a function that renders messages and the end token with a Jinja template, in Jinja's sandbox.

    The sandbox also limits the template's cost: its size, the sum of its ranges, multiplications, and the size of the
    text.

    Raises:
        UserError: jinja2 is missing, or the template is invalid or too large. The returned function raises it if the
            template rejects the messages or exceeds a limit.
    """
    try:
        import jinja2
        import jinja2.sandbox
        from jinja2.exceptions import SecurityError
    except ImportError:
        raise UserError("the run's chat template needs jinja2; install it with pip install 'gptjax[chat]'") from None
    if len(source) > LARGEST_TEMPLATE:
        raise UserError(
            f"the run's chat template has {len(source):,} characters, must have at most {LARGEST_TEMPLATE:,}"
        )

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            numbers = [isinstance(x, int | float) and abs(x) <= LARGEST_FACTOR for x in (left, right)]
            if operator == "**" or not all(numbers):
                raise SecurityError(f"{operator} of texts, lists or large numbers is not allowed")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(f"the run's chat template is no valid Jinja template: {error}") from None

    def render(messages: Sequence[Message], end_token: str) -> str:
        values = [{"role": message.role, "content": message.content} for message in messages]
        left = MOST_ROUNDS

        def bounded_range(*args: int) -> range:
            nonlocal left
            left -= len(range(*args))
            if left < 0:
                raise SecurityError(f"its ranges have more than {MOST_ROUNDS:,} numbers in all")
            return range(*args)

        given = {"bos_token": end_token, "eos_token": end_token, "range": bounded_range}
        pieces, size = [], 0
        try:
            for piece in template.generate(messages=values, add_generation_prompt=True, **given):
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_TEXT:
                    raise SecurityError(f"its text has more than {LARGEST_TEXT:,} characters")
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise UserError(f"the run's chat template refuses the messages: {error}") from None
        return "".join(pieces)

    return render
