"""Chats: rows in the common layouts → messages → text with the spans that are targets, and prompts for sampling.

Training and sampling render messages with the same functions, so that the text before a response is the same, and has
the same token ids, in both.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.text.formats import Row, missing_field

ASSISTANT, USER = "assistant", "user"
SHAREGPT_FIELD = "conversations"
ALPACA_FIELDS = ("instruction", "input", "output")
_ROLES = {"human": USER} | dict.fromkeys(("gpt", "chatgpt", "bard", "bing", "model"), ASSISTANT)

_JOINED = re.compile(r"(?: +| *(?:[^\w\s]|_)+)$")


class Message(NamedTuple):
    """One turn."""

    role: str
    content: str


class Chat(NamedTuple):
    """A chat of `instruct` as text."""

    text: str
    targets: tuple[tuple[int, int], ...]
    """Character spans `[start, end)` that are targets: the assistant's text up to the next message, and the white space
    or punctuation before it, see `_before_join`."""
    where: str

    @property
    def ends_in_target(self) -> bool:
        """Whether the last message is the assistant's, so that the end of the chat is a target too."""
        return bool(self.targets) and self.targets[-1][1] == len(self.text)


def render_chat(messages: Sequence[Message], template: str, where: str) -> Chat:
    """Renders messages with `task.template`."""
    before, after = template.split("{content}")
    text, targets = "", []
    for message in messages:
        header = before.replace("{role}", message.role)
        start = len(text) + len(_before_join(header))
        text += header + message.content + after.replace("{role}", message.role)
        if message.role == ASSISTANT:
            targets.append((start, len(text)))
    return Chat(text, tuple(targets), where)


def render_prompt(messages: Sequence[Message], template: str) -> str:
    """The text of `render_chat` up to the start of the assistant's answer to `messages`."""
    header = template.split("{content}")[0].replace("{role}", ASSISTANT)
    return render_chat(messages, template, "").text + _before_join(header)


def _before_join(header: str) -> str:
    """The text before a response, without the white space or punctuation at its end.

    Tokenizers join these to the next word (" It", ">It"). So a prompt that ended with them would have other ids than
    the same text in training. Therefore they belong to the target, and the model generates them.
    """
    return _JOINED.sub("", header)


def parse_chat(row: Row, task: TaskConfig, counts: Counter[str]) -> Chat | None:
    """Parses a row in one of the layouts of `_read_turns`; None if no turn of the assistant has text.

    Args:
        row: The row.
        task: Names of the fields, and the template.
        counts: Incremented at "turns_without_text" (skipped turns) and "chats_without_target".

    Raises:
        UserError: The row has none of the layouts, a turn is malformed, or there is no turn of the assistant.
    """
    turns = _read_turns(row, task)
    if not any(role == ASSISTANT for role, _ in turns):
        raise UserError(f"{row.where}: no message of role {ASSISTANT}, so there is nothing to learn")
    messages = [Message(role, content) for role, content in turns if content is not None]
    counts["turns_without_text"] += len(turns) - len(messages)
    if not any(message.role == ASSISTANT for message in messages):
        counts["chats_without_target"] += 1
        return None
    return render_chat(messages, task.template, row.where)


def _read_turns(row: Row, task: TaskConfig) -> list[tuple[str, str | None]]:
    """Returns `(role, content)` of each turn. The content is None if a turn has no text, such as a tool call.

    The first layout that the row has is used. Fields that are null or an empty list count as absent. The layouts are:
    `task.messages_field` (role and content); "conversations" (ShareGPT: from and value); `task.prompt_field` and
    `task.response_field`; "instruction", "input" and "output" (Alpaca).
    """
    values = row.values
    for name in (task.messages_field, SHAREGPT_FIELD):
        if values.get(name):
            return _turns_of(values[name], name, row)
    prompt, response = task.prompt_field, task.response_field
    if prompt in values or response in values:
        for name, option in ((prompt, "task.prompt_field"), (response, "task.response_field")):
            if name not in values:
                raise missing_field(row.where, name, option, values)
        return [(USER, _content(values[prompt], prompt, row)), (ASSISTANT, _content(values[response], response, row))]
    instruction, given, output = ALPACA_FIELDS
    if instruction in values and output in values:
        parts = [_content(values.get(name), name, row) for name in (instruction, given)]
        question = "\n\n".join(part for part in parts if part is not None)
        return [(USER, question or None), (ASSISTANT, _content(values[output], output, row))]
    if task.messages_field in values:
        raise UserError(f"{row.where}: field {task.messages_field!r} has no message, and there is no {prompt!r}")
    raise missing_field(row.where, task.messages_field, "task.messages_field", values)


def _turns_of(messages: Any, name: str, row: Row) -> list[tuple[str, str | None]]:
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise UserError(f"{row.where}: field {name!r} must be a list of {{role, content}} or {{from, value}}")
    turns = []
    for message in messages:
        role = message.get("role") or message.get("from")
        if not isinstance(role, str):
            raise UserError(f"{row.where}: a message of {name!r} has no role; it has {', '.join(map(repr, message))}")
        content = message["content"] if "content" in message else message.get("value")
        turns.append((_ROLES.get(role, role), _content(content, name, row)))
    return turns


def _content(content: Any, name: str, row: Row) -> str | None:
    """A turn's text, or None. A list of parts, as in the OpenAI API, is joined."""
    if isinstance(content, (list, tuple)) and all(isinstance(part, dict) for part in content):
        if any("role" in part for part in content):
            raise UserError(
                f"{row.where}: field {name!r} holds messages, must be a string; put all turns into one list"
            )
        content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
    if content is not None and not isinstance(content, str):
        raise UserError(f"{row.where}: a message of {name!r} is a {type(content).__name__}, must be a string")
    return content if content and content.strip() else None
