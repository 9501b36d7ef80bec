"""Several tasks or several sources of text in one run."""

import dataclasses
import re

from gptjax.config.data import DataConfig
from gptjax.config.rules import no_effect, not_negative, positive
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError

PARTS = ("pretrain", "classify", "regress", "choose", "tag", "instruct")
"""Tasks that `multi` can combine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartConfig:
    """One of several tasks that share a model."""

    name: str
    """Name of the part's head and scores: letters, digits, - and _."""
    weight: float = 1.0
    """Weight of the part's mean loss in the sum that is minimised."""
    head: str = ""
    """Name of another part whose head this part uses, as for a source and a target domain; empty: a head of its own."""
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"parts: name={self.name!r} must be of letters, digits, - and _")
        positive(f"parts: {self.name}", self, "weight")
        if self.task.kind not in PARTS:
            raise UserError(f"parts: {self.name}: task.kind={self.task.kind} must be one of {', '.join(PARTS)}")
        if self.task.objective.kind != "causal":
            raise UserError(
                f"parts: {self.name}: task.objective.kind={self.task.objective.kind} must be causal in a run of several"
                " tasks"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of text that a run mixes."""

    name: str
    """Name of the source in log lines and metrics: letters, digits, - and _."""
    weight: float = 1.0
    """Share of the sequences, relative to the weights of the other sources; 0: unused until changes sets a weight."""
    changes: tuple[str, ...] = ()
    """Weights from later steps on, as STEP:WEIGHT."""
    epochs: float = 0.0
    """Instead of weights: epochs of this source, relative to those of the other sources. Set it for every source."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    def __post_init__(self):
        where = f"sources: {self.name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise UserError(f"sources: name={self.name!r} must be of letters, digits, - and _")
        not_negative(where, self, "weight", "epochs")
        for change in self.changes:
            if not re.fullmatch(r"[1-9]\d{0,9}:\d+(\.\d+)?", change):
                raise UserError(f"{where}: changes={change!r} must be like 1000:0.5, a step above 0 and a weight")
        if self.epochs and (self.weight != 1 or self.changes):
            raise UserError(f"{where}: weight and changes have no effect with epochs={self.epochs}; give one of them")
        for name in ("packing", "attend_across_documents", "verify"):
            no_effect(f"{where}: data", self.data, name, False, "a run of one source; set it in the run's own data")

    @property
    def weight_changes(self) -> dict[int, float]:
        """The weights of `changes` by their step."""
        return {int(step): float(weight) for step, _, weight in (change.partition(":") for change in self.changes)}

    def weight_at(self, step: int) -> float:
        """The weight at a step."""
        return [w for s, w in sorted({0: self.weight, **self.weight_changes}.items()) if s <= step][-1]
