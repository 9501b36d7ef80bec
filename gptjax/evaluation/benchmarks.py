"""Rows of public benchmarks → items: a context with several continuations to choose from, or an answer to generate.

Prompts are the same as in the tasks of the same name in EleutherAI's lm-evaluation-harness, so scores are comparable.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from gptjax.errors import UserError
from gptjax.text.formats import Row, text_value
from gptjax.text.labelled import is_missing, string_list
from gptjax.text.rows import field_value

SEPARATOR = "\n\n"
"""Separates the examples of a few-shot prompt."""
FIELD = "benchmark"
"""The option that decides which fields a row must have, for error messages."""


class Item(NamedTuple):
    """One question."""

    contexts: tuple[str, ...]
    """The context of each choice. They are equal, except for benchmarks that fill a blank inside a sentence."""
    continuations: tuple[str, ...]
    """The continuation of each choice. A single one is the expected continuation."""
    answer: int
    """Number of the right choice."""
    where: str
    accepted: tuple[str, ...] = ()
    """Accepted answers, for items that are answered by generating text."""

    @property
    def shown(self) -> str:
        """The item with its right answer, as a few-shot example for other items."""
        return self.contexts[self.answer] + self.continuations[self.answer]


def read_items(benchmark: str, rows: Iterable[Row], counts: Counter[str]) -> Iterator[Item]:
    """Yields the items of rows. Skips rows without an answer, and counts them as "without_answer".

    Raises:
        UserError: A field of a row is missing or has an invalid value; the message names file and row.
    """
    read = READERS[benchmark]
    for row in rows:
        item = read(row)
        if item is None:
            counts["without_answer"] += 1
        else:
            yield item


def read_choices(row: Row) -> Item | None:
    """{"context": ..., "choices": [...], "answer": number from 0, or the text of the right choice}."""
    context, choices = _text(row, "context"), _texts(row, "choices")
    if _unanswered(row, "answer", choices):
        return None
    answer = _answer(row, "answer", choices)
    return _same_context(row, context, [_spaced(context, choice) for choice in choices], answer)


def read_generate(row: Row) -> Item | None:
    """{"context": ..., "answer": the right answer, or a list of those that are right}."""
    context = _text(row, "context")
    answers = row.values.get("answer", "")
    if answers is None or (answers == "" and "answer" in row.values):
        return None  # here, -1 and other numbers are valid answers
    answers = field_value(row, "answer", FIELD)
    accepted = tuple(map(str, answers)) if isinstance(answers, (list, tuple)) else (str(answers),)
    if not accepted or not all(accepted):
        raise UserError(f"{row.where}: field 'answer' has an empty answer; give each one at least one character")
    return Item((context,), (_spaced(context, accepted[0]),), 0, row.where, accepted)


def read_hellaswag(row: Row) -> Item | None:
    """{"activity_label", "ctx_a", "ctx_b", "endings", "label"}."""
    if _unanswered(row, "label"):
        return None
    start = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    endings = [_without_marks(ending) for ending in _texts(row, "endings")]
    return _same_context(
        row, _without_marks(start), [f" {ending}" for ending in endings], _number(row, "label", len(endings))
    )


def read_lambada(row: Row) -> Item:
    """{"text": a passage whose last word is the answer}."""
    context, _, word = _text(row, "text").strip().rpartition(" ")
    if not context:
        raise UserError(f"{row.where}: field 'text' is a single word; it needs a passage and its last word")
    return Item((context,), (f" {word}",), 0, row.where)


def read_arc(row: Row) -> Item | None:
    """{"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}, or columns question, choices, answerKey."""
    if _unanswered(row, "answerKey"):
        return None
    question, choices = field_value(row, "question", FIELD), row.values.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, dict):
        labels, texts = choices.get("label", ()), choices.get("text", ())
    else:
        listed = choices if isinstance(choices, (list, tuple)) else ()
        labels, texts = [choice.get("label") for choice in listed], [choice.get("text") for choice in listed]
    key = str(row.values["answerKey"])
    if key not in labels or len(labels) != len(texts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{row.where}: answerKey={key!r} must be the label of one of its choices, which are {labels}")
    context = f"Question: {text_value(question, row.where, 'question')}\nAnswer:"
    return _same_context(row, context, [f" {text}" for text in texts], list(labels).index(key))


def read_piqa(row: Row) -> Item | None:
    """{"goal", "sol1", "sol2", "label"}: 0 or 1."""
    if _unanswered(row, "label"):
        return None
    context = f"Question: {_text(row, 'goal')}\nAnswer:"
    return _same_context(row, context, [f" {_text(row, name)}" for name in ("sol1", "sol2")], _number(row, "label", 2))


def read_winogrande(row: Row) -> Item | None:
    """{"sentence": with the blank "_", "option1", "option2", "answer"}: 1 or 2."""
    if _unanswered(row, "answer"):
        return None
    before, blank, after = _text(row, "sentence").partition("_")
    if not blank or not after.strip():
        raise UserError(f"{row.where}: field 'sentence' needs a blank '_' with text after it")
    answer = _number(row, "answer", 2, first=1)
    contexts = tuple(before + _text(row, name) for name in ("option1", "option2"))
    # Only the text after the blank is scored; it is the same for both options (partial evaluation).
    return Item(contexts, (f" {after.strip()}",) * 2, answer, row.where)


def read_boolq(row: Row) -> Item | None:
    """{"passage", "question", "answer": true or false}, or "label": 1 or 0."""
    name = "answer" if "answer" in row.values else "label"
    if _unanswered(row, name):
        return None
    words = {"true": 1, "1": 1, "false": 0, "0": 0}
    answer = words.get(str(row.values[name]).lower())
    if answer is None:
        raise UserError(f"{row.where}: {name}={row.values[name]!r} must be true or false")
    context = f"{_text(row, 'passage')}\nQuestion: {_text(row, 'question')}?\nAnswer:"
    return _same_context(row, context, [" no", " yes"], answer)


def read_mmlu(row: Row) -> Item | None:
    """{"question", "choices": four, "answer": 0 to 3}, or columns question, A, B, C, D, answer: A to D."""
    if _unanswered(row, "answer"):
        return None
    letters = "ABCD"
    choices = _texts(row, "choices") if "choices" in row.values else [_text(row, letter) for letter in letters]
    if len(choices) != len(letters):
        raise UserError(f"{row.where}: field 'choices' has {len(choices)} choices, must have {len(letters)}")
    answer = str(row.values["answer"]).strip()
    number = letters.index(answer) if answer in tuple(letters) else _number(row, "answer", len(letters))
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    context = "\n".join([_text(row, "question").strip(), *lines, "Answer:"])
    return _same_context(row, context, [f" {letter}" for letter in letters], number)


READERS: dict[str, Callable[[Row], Item | None]] = {
    "choices": read_choices,
    "hellaswag": read_hellaswag,
    "lambada": read_lambada,
    "arc": read_arc,
    "piqa": read_piqa,
    "winogrande": read_winogrande,
    "boolq": read_boolq,
    "mmlu": read_mmlu,
    "generate": read_generate,
}
"""By benchmark: the function that parses a row to an item, or returns None for a row without an answer."""
COLUMNS: dict[str, tuple[str, ...]] = {"mmlu": ("question", "A", "B", "C", "D", "answer")}
"""Columns of CSV files that are published without a header."""


def _same_context(row: Row, context: str, continuations: Sequence[str], answer: int) -> Item:
    return Item((context,) * len(continuations), tuple(continuations), answer, row.where)


def _text(row: Row, name: str) -> str:
    return text_value(field_value(row, name, FIELD), row.where, name)


def _texts(row: Row, name: str) -> list[str]:
    texts = [text_value(text, row.where, name) for text in string_list(row, name, FIELD)]
    if len(texts) < 2:
        raise UserError(f"{row.where}: field {name!r} has {len(texts)} choices, must have at least 2")
    return texts


def _unanswered(row: Row, name: str, choices: Sequence[str] = ()) -> bool:
    """Whether a row has no answer, as in test sets whose answers are not published.

    Raises:
        UserError: The row does not have the field.
    """
    if row.values.get(name, "") is None:
        return True
    value = field_value(row, name, FIELD)
    return not isinstance(value, (list, tuple)) and is_missing(value, choices)


def _answer(row: Row, name: str, choices: Sequence[str]) -> int:
    value = row.values[name]
    return choices.index(value) if isinstance(value, str) and value in choices else _number(row, name, len(choices))


def _number(row: Row, name: str, count: int, first: int = 0) -> int:
    """The number of a choice, from 0, in a field that counts choices from `first`."""
    value = row.values[name]
    try:
        number = int(str(value)) - first
    except ValueError:
        number = -1
    if not 0 <= number < count:
        raise UserError(f"{row.where}: {name}={value!r} must be a number from {first} to {first + count - 1}")
    return number


def _spaced(context: str, text: str) -> str:
    """The text to append to a context: with one space before it, unless there is white space already."""
    return text if not context or context[-1:].isspace() or text[:1].isspace() else f" {text}"


def _without_marks(text: str) -> str:
    """HellaSwag's text without WikiHow markup such as [header]."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
