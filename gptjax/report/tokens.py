"""Tokens coloured by their probability, for a terminal."""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

STYLES = ((0.5, "black on green3"), (0.1, "black on gold1"), (0.01, "black on dark_orange"), (0.0, "white on red3"))
"""Smallest probability of each colour."""


class TokenRow(NamedTuple):
    """A chosen token."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    """The most likely tokens and their log-probabilities."""


def print_tokens(prompt: str, rows: Sequence[TokenRow]) -> None:
    """Prints a prompt and its continuation, coloured on a terminal, and a table of the tokens."""
    console = Console(file=sys.stdout, highlight=False)
    text = Text(prompt)
    for row in rows:
        text.append(row.text, style_of(row.logprob))
    console.print(text, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    table.add_column("probability", justify="right")
    table.add_column("most likely")
    for row in rows:
        likely = "  ".join(f"{_shown(text)} {math.exp(logprob):.1%}" for text, logprob in row.top)
        table.add_row(Text(_shown(row.text), style_of(row.logprob)), f"{math.exp(row.logprob):.1%}", Text(likely))
    console.print(table)


def style_of(logprob: float) -> str:
    """The colour of a token."""
    return next(style for least, style in STYLES if math.exp(logprob) >= least)


def _shown(text: str) -> str:
    """A token in quotes, with escapes for characters that a terminal does not show."""
    return repr(text)
