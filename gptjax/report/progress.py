"""Shows the progress of a run: a live panel, a live line on a small terminal, plain lines if there is no terminal."""

import contextlib
import os
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from gptjax.report.cost import readable_time
from gptjax.report.panel import View, fits, panel
from gptjax.report.reference import NEWEST, Reference

SILENCE = 10.0
"""Without a terminal, an evaluation prints a line every so many seconds."""
INDENT = "    | "
MOST_LOSSES = 1000
"""Number of logged losses in the sparkline."""
WIDEST = 120
"""Largest width of the panel in columns."""


def say(text: str) -> None:
    """Prints a line. If the reader has exited (`| head`, a closed terminal), all further output is discarded."""
    try:
        print(text, flush=True)
    except OSError:
        silence_output()


def silence_output() -> None:
    """Discards all further output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def visible(text: str) -> str:
    """Replaces control characters in a text, except line breaks and tabs."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def notify(message: str) -> None:
    """Prints a line to standard error, separate from results."""
    print(f"gptjax: {message}", file=sys.stderr)


class RowProgress:
    """A progress bar on standard error; shows nothing if that is not a terminal."""

    def __init__(self, total: int | None, done: int, unit: str):
        """`total` is None if unknown."""
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Bars(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("", total=total, completed=done)
        self._bar.start()

    def advance(self, rows: int) -> None:
        """Adds finished rows."""
        self._bar.advance(self._task, rows)

    def close(self) -> None:
        """Removes the bar."""
        self._bar.stop()


class Progress:
    """Shows the newest metrics of a run, and the remaining time of steps and evaluations.

    Args:
        num_steps: Steps of the run.
        first_step: Number of steps before this start.
        evaluations_after: Returns the number of evaluations after a step.
        evaluation_batches: Forward passes of an evaluation; 0: unknown.
        step_batches: Forward and backward passes of a step.
        flops_per_token: Training FLOPs per token; 0: unknown.
        peak_flops: Peak of all devices together; None: unknown.
        name: Name of the run, for the panel.
        reference: Reference curve of the run's preset; None: none fits the run.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int,
        evaluations_after: Callable[[int], int],
        evaluation_batches: int,
        step_batches: int,
        flops_per_token: float,
        peak_flops: float | None,
        name: str = "",
        reference: Reference | None = None,
    ):
        self._num_steps, self._flops_per_token, self._peak_flops = num_steps, flops_per_token, peak_flops
        self._reference = reference
        self._losses: list[tuple[int, float]] = []
        self._evaluations_after = evaluations_after
        # Estimate until the first evaluation: a forward pass takes a third of a forward and backward pass.
        self._evaluation_in_steps = evaluation_batches / step_batches / 3
        self._evaluation_seconds: float | None = None
        self._started, self._first_step, self._seconds_evaluating = time.monotonic(), first_step, 0.0
        self._console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False) if sys.stdout.isatty() else None
        self._view = View(visible(name), num_steps, first_step, "training")
        if self._live:
            self._live.start()

    def step(self, row: dict, data_wait: float = 0.0, memory: int = 0) -> None:
        """Shows a logged step.

        Args:
            row: Row of `metrics.jsonl`.
            data_wait: Share of the time since the last logged step that training waited for data.
            memory: Bytes in use; 0: unknown.
        """
        above = self._above_reference(row)
        self._update_view(row, data_wait, memory)
        parts = [
            f"step {row['step']}/{self._num_steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"grad {row['grad_norm']:.2f}",
            f"{row['tokens_per_s']:,.0f} tokens/s",
        ]
        if self._peak_flops:
            parts.append(f"MFU {100 * row['tokens_per_s'] * self._flops_per_token / self._peak_flops:.1f} %")
        if above is not None:
            parts.append(f"{above:+.3f} to reference")
        if row["skipped"]:
            parts.append(f"{row['skipped']} steps skipped")
        parts.append(f"{readable_time(self._seconds_left_at_step(row['step']))} left")
        self._show(" · ".join(parts))

    @contextlib.contextmanager
    def evaluation(self, step: int, batches: int):
        """Times an evaluation; yields a function to call before each of its batches.

        Args:
            step: Step of the run.
            batches: Number of batches; 0: unknown.
        """
        after = self.seconds_left(step)
        began = shown = time.monotonic()
        done = 0

        def before_batch() -> None:
            nonlocal done, shown
            now = time.monotonic()
            if self._live or now - shown >= SILENCE:
                shown = now
                left = ""
                if done and batches:
                    seconds = (now - began) / done * (batches - done) + after
                    left = f" · {readable_time(seconds)} left"
                of = f" of {batches}" if batches else ""
                self._view.status = f"evaluating, batch {done + 1}{of}"
                self._view.left = left.removeprefix(" · ").removesuffix(" left")
                self._show(f"step {step}/{self._num_steps} · evaluating, batch {done + 1}{of}{left}")
            done += 1

        try:
            yield before_batch
            self._evaluation_seconds = time.monotonic() - began
        finally:
            self._view.status = "training"
            self._seconds_evaluating += time.monotonic() - began

    def evaluated(self, step: int, scores: str, val_loss: float | None = None) -> None:
        """Prints the scores of an evaluation; `val_loss` is compared with the reference."""
        found = None if self._reference is None or val_loss is None else self._reference.validation(step, val_loss)
        if found is not None:
            scores += f" · {found[0]:+.4f} to reference (band {found[1]:.4f})"
        self._view.evaluation = f"step {step:,}: {scores}"
        self.line(f"step {step} · validation {scores}")

    def line(self, text: str) -> None:
        """Prints a permanent line."""
        try:
            if self._live:
                self._console.print(Text(text))
            else:
                say(text)
        except OSError:
            silence_output()

    def sample(self, text: str) -> None:
        """Prints a text with its line breaks; replaces control characters."""
        shown = visible(text)
        self._view.sample = " ".join(shown.split())
        self.line("\n".join(INDENT + line for line in shown.split("\n")))

    def close(self) -> None:
        """Removes the live line."""
        if self._live:
            with contextlib.suppress(OSError):
                self._live.stop()

    def seconds_left(self, step: int) -> float:
        """Estimates the time of the steps after `step` and their evaluations."""
        return self._estimate(step, self._evaluations_after(step))

    def _seconds_left_at_step(self, step: int) -> float:
        """The same including the evaluation of `step` itself: a step is shown before its evaluation is made."""
        return self._estimate(step, self._evaluations_after(step - 1))

    def _estimate(self, step: int, evaluations: int) -> float:
        training = time.monotonic() - self._started - self._seconds_evaluating
        each = training / max(1, step - self._first_step)
        evaluation = self._evaluation_seconds
        if evaluation is None:
            evaluation = each * self._evaluation_in_steps
        return each * (self._num_steps - step) + evaluation * evaluations

    def _above_reference(self, row: dict) -> float | None:
        """How far the newest training losses are above the reference."""
        if self._reference is None:
            return None
        self._losses = [*self._losses, (row["step"], row["loss"])][-NEWEST:]
        self._view.above_reference = self._reference.training(self._losses)
        return self._view.above_reference

    def _update_view(self, row: dict, data_wait: float, memory: int) -> None:
        view = self._view
        view.step, view.left = row["step"], readable_time(self._seconds_left_at_step(row["step"]))
        view.losses = [*view.losses, row["loss"]][-MOST_LOSSES:]
        view.learning_rate, view.grad_norm, view.skipped = row["learning_rate"], row["grad_norm"], row["skipped"]
        view.tokens_per_s, view.data_wait, view.memory = row["tokens_per_s"], data_wait, memory
        if self._peak_flops:
            view.mfu = row["tokens_per_s"] * self._flops_per_token / self._peak_flops

    def _show(self, text: str) -> None:
        """Redraws the panel or the live line, cut at the terminal's width; without a terminal, prints a line."""
        try:
            if self._live and fits(self._console):
                unicode = self._console.encoding.startswith("utf")
                width = min(self._console.width, WIDEST)
                self._live.update(panel(self._view, width, unicode), refresh=True)
            elif self._live:
                self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            else:
                say(text)
        except OSError:
            silence_output()
