"""The live panel of a run on a terminal: a box of a few lines, redrawn in place. Control characters are removed.

It uses the normal screen and the terminal's own colours, so it works in tmux and screen.
"""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from gptjax.report.cost import readable_bytes

LEAST_WIDTH, LEAST_HEIGHT = 80, 16
"""Smallest number of columns and lines for the panel. On smaller terminals a run shows one live line."""
SPARKS, BAR = "▁▂▃▄▅▆▇█", "━─"
PLAIN_SPARKS, PLAIN_BAR = "_.-=+*%#", "#-"
"""For terminals without these characters."""


@dataclasses.dataclass
class View:
    """The data of the panel."""

    name: str
    num_steps: int
    step: int = 0
    status: str = ""
    """The current activity, such as training."""
    left: str = ""
    """Remaining time, including evaluations."""
    losses: list[float] = dataclasses.field(default_factory=list)
    """Losses of the logged steps, the newest last."""
    learning_rate: float = 0.0
    grad_norm: float = 0.0
    tokens_per_s: float = 0.0
    mfu: float | None = None
    """Share of the devices' peak; None: unknown."""
    data_wait: float = 0.0
    """Share of the time that training waited for data."""
    memory: int = 0
    """Bytes; 0: unknown."""
    skipped: int = 0
    above_reference: float | None = None
    """Newest training losses minus those of the reference curve; None: there is none, or too few losses."""
    evaluation: str = ""
    sample: str = ""
    """One line."""


def fits(console: Console) -> bool:
    """Whether a terminal has room for the panel."""
    return console.width >= LEAST_WIDTH and console.height >= LEAST_HEIGHT


def panel(view: View, width: int, unicode: bool = True) -> Panel:
    """Draws the panel, `width` columns wide."""
    sparks, bar = (SPARKS, BAR) if unicode else (PLAIN_SPARKS, PLAIN_BAR)
    inner = width - 4
    share = min(1.0, view.step / view.num_steps)
    head = f"step {view.step:,} of {view.num_steps:,}"
    end = f" {share:.0%}"
    room = max(0, inner - len(head) - len(end) - 1)
    done = round(room * share)
    loss = f"loss {view.losses[-1]:.4f}  " if view.losses else "loss -  "
    speed = [f"{view.tokens_per_s:,.0f} tokens/s"]
    speed += [] if view.mfu is None else [f"MFU {view.mfu:.1%}"]
    speed += [f"data wait {view.data_wait:.1%}"]
    speed += [f"memory {readable_bytes(view.memory)}"] if view.memory else []
    rates = [f"learning rate {view.learning_rate:.2e}", f"gradient norm {view.grad_norm:.3g}"]
    rates += [f"{view.skipped} steps skipped"] if view.skipped else []
    rates += [] if view.above_reference is None else [f"{view.above_reference:+.3f} to reference"]
    lines = [
        f"{head} {bar[0] * done}{bar[1] * (room - done)}{end}",
        loss + sparkline(view.losses, inner - len(loss), sparks),
        "   ".join(rates),
        "   ".join(speed),
        f"validation  {view.evaluation or '-'}",
        f"sample      {view.sample or '-'}",
    ]
    text = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
    title = Text(f" {view.name} ", no_wrap=True, overflow="ellipsis")
    left = f" · {view.left} left" if view.left else ""
    subtitle = Text(f" {view.status}{left} ", no_wrap=True, overflow="ellipsis")
    return Panel(text, title=title, title_align="left", subtitle=subtitle, subtitle_align="right", width=width)


def sparkline(values: Sequence[float], width: int, sparks: str = SPARKS) -> str:
    """Draws values as a line of at most `width` blocks; each block is the mean of adjacent values."""
    values = [value for value in values if value == value and abs(value) != float("inf")]
    if not values or width <= 0:
        return ""
    count = min(width, len(values))
    groups = [values[len(values) * n // count : len(values) * (n + 1) // count] for n in range(count)]
    means = [sum(group) / len(group) for group in groups]
    low, high = min(means), max(means)
    return "".join(sparks[int((mean - low) / (high - low or 1) * (len(sparks) - 1) + 0.5)] for mean in means)
