"""What the user sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from gptjax.report.cost import readable_time


def say(text: str) -> None:
    """Prints a line. Where nobody reads any more (`| head`, a closed terminal), it and all that follow go nowhere."""
    try:
        print(text, flush=True)
    except OSError:
        say_no_more()


def say_no_more() -> None:
    """Sends what is printed from now on nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def notify(message: str) -> None:
    """Tells the user something on standard error, where it does not mix with results."""
    print(f"gptjax: {message}", file=sys.stderr)


class Progress:
    """Shows the newest metrics of a run of `num_steps`; `line` prints something that stays."""

    def __init__(self, num_steps: int, first_step: int, flops_per_token: float, peak_flops: float | None):
        self._num_steps, self._flops_per_token, self._peak_flops = num_steps, flops_per_token, peak_flops
        self._started, self._first_step = time.monotonic(), first_step
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False) if sys.stdout.isatty() else None
        if self._live:
            self._live.start()

    def step(self, row: dict) -> None:
        """Shows a logged step."""
        parts = [
            f"step {row['step']}/{self._num_steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"grad {row['grad_norm']:.2f}",
            f"{row['tokens_per_s']:,.0f} tokens/s",
        ]
        if self._peak_flops:
            parts.append(f"MFU {100 * row['tokens_per_s'] * self._flops_per_token / self._peak_flops:.1f} %")
        if row["skipped"]:
            parts.append(f"{row['skipped']} steps skipped")
        parts.append(f"{readable_time(self._seconds_left(row['step']))} left")
        text = " · ".join(parts)
        try:
            if self._live:
                self._live.update(Text(text), refresh=True)
            else:
                say(text)
        except OSError:
            say_no_more()

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        try:
            if self._live:
                self._console.print(Text(text))
            else:
                say(text)
        except OSError:
            say_no_more()

    def close(self) -> None:
        """Takes the live line away."""
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()

    def _seconds_left(self, step: int) -> float:
        done = step - self._first_step
        return (time.monotonic() - self._started) / max(1, done) * (self._num_steps - step)
