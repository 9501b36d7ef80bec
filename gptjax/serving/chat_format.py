"""How a run writes chats: from messages to the token ids that its model continues, and where an answer ends."""

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
"""Bounds of a Jinja template, far above what the templates of published models need."""


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The chats of one run."""

    encode: Callable[[Sequence[Message]], np.ndarray]
    """Token ids up to where the answer to the messages begins."""
    stops: tuple[str, ...]
    """Texts that end an answer, beside end-of-text: what the template writes behind it, or before the next message."""
    header_end: str
    """The end of the header, where the model writes it before an answer; see `chats.render_prompt`."""


class AnswerFilter:
    """Takes what belongs to the template from an answer that arrives in pieces: `header_end`, and spaces at the end."""

    def __init__(self, format: ChatFormat):
        self._head, self._held = format.header_end, ""

    def feed(self, piece: str, final: bool = False) -> str:
        """Returns the text that is certain by now."""
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
    """How a run writes chats; None: it learned none.

    A template that came with an imported model is used before `task.template`.

    Raises:
        UserError: It learned chats of several templates, or its template is no valid one.
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
    if not stops[0]:  # nothing but spaces, which may stand inside an answer too
        stops = [f"{after}{before.replace('{role}', role)}".rstrip() for role in (USER, ASSISTANT, SYSTEM)]
    header_end = before.replace("{role}", ASSISTANT).removeprefix(written)
    return ChatFormat(encode, tuple(dict.fromkeys(filter(str.strip, stops))), header_end)


def _jinja_format(source: str, tokenizer: Tokenizer) -> ChatFormat:
    render, special = compile_template(source), tokenizer.special_tokens

    def encode(messages: Sequence[Message]) -> np.ndarray:
        for message in messages:
            for name in special:
                if name in message.content:
                    raise UserError(f"a message holds {name}, which the chat template keeps for itself; leave it out")
        return tokenizer.encode_with_special(render(messages, tokenizer.end_token))

    ends = tuple(name for name in special if name != tokenizer.end_token)
    return ChatFormat(encode, ends, "")


def compile_template(source: str) -> Callable[[Sequence[Message], str], str]:
    """Returns a function of messages and end token that a Jinja template makes text of, in Jinja's sandbox.

    The sandbox also bounds what a template can cost: its own size, the sum of its ranges, what it multiplies, and the
    size of the text.

    Raises:
        UserError: jinja2 is missing, or the template is no valid one or too large. The function raises it where the
            template refuses messages, or costs too much.
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
