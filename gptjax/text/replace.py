"""Replaces words by synonyms from a user's file."""

import re
from pathlib import Path

import numpy as np

from gptjax.errors import UserError

WORD = re.compile(r"\w+")
Synonyms = dict[str, tuple[str, ...]]


def read_synonyms(path: str) -> Synonyms:
    """Reads a file of synonyms: each line has words with the same meaning, separated by tabs. Case is ignored.

    Returns:
        The synonyms of each word in lower case.

    Raises:
        UserError: The file cannot be read or is empty, or a line has a single word.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"task.synonyms={path!r} cannot be read: {error}") from None
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split("\t") if word.strip()]
        if len(words) == 1:
            raise UserError(f"{path}:{number}: {words[0]!r} has no synonym; separate words of one meaning by tabs")
        for word in words:
            others = [other for other in words if other.lower() != word.lower()]
            found[word.lower()] = [*found.get(word.lower(), []), *others]
    if not found:
        raise UserError(f"task.synonyms={path!r} has no words; give lines of words of one meaning, separated by tabs")
    return {word: tuple(others) for word, others in found.items()}


def replace_words(text: str, synonyms: Synonyms, share: float, random: np.random.Generator) -> str:
    """Replaces each known word with probability `share`; a replaced word keeps the case of its first letter."""

    def other(match: re.Match) -> str:
        word = match.group()
        others = synonyms.get(word.lower())
        if not others or random.random() >= share:
            return word
        chosen = others[random.integers(len(others))]
        return chosen[:1].upper() + chosen[1:] if word[0].isupper() else chosen

    return WORD.sub(other, text)
