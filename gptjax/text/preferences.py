"""Rows of a prompt and two responses → examples of `reward` and `dpo`."""

from collections import Counter

from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError
from gptjax.text.chats import ASSISTANT, USER, Chat, Message, render_chat
from gptjax.text.formats import Row
from gptjax.text.labelled import Preference
from gptjax.text.rows import text_field


def parse_preference(
    row: Row, task: TaskConfig, _data: DataConfig, labelled: bool, counts: Counter[str]
) -> Preference | None:
    """See `text.labelled.ParseRow`. Without labels, the row has one response, to be scored.

    A row with two equal responses is left out and counted.
    """
    prompt = text_field(row, task.prompt_field, "task.prompt_field")

    def chat(name: str, option: str) -> Chat:
        response = text_field(row, name, option)
        return render_chat([Message(USER, prompt), Message(ASSISTANT, response)], task.template, row.where)

    if not labelled:
        return Preference(prompt, chat(task.response_field, "task.response_field"), None, row.where)
    if task.chosen_field == task.rejected_field:
        raise UserError(f"task.chosen_field and task.rejected_field are both {task.chosen_field!r}; name two fields")
    chosen = chat(task.chosen_field, "task.chosen_field")
    rejected = chat(task.rejected_field, "task.rejected_field")
    if chosen.text == rejected.text:
        counts["equal_responses"] += 1
        return None
    return Preference(prompt, chosen, rejected, row.where)


def plain_text(example: Preference) -> str:
    """The text of both chats."""
    return "\n".join(chat.text for chat in (example.chosen, example.rejected) if chat is not None)
