"""Options of the optimizer and the learning rate."""

import dataclasses
import re
from typing import Literal

from gptjax.config.rules import fraction, no_effect, not_negative, positive
from gptjax.errors import UserError

EXTENSION = re.compile(r"(continue|restart) at (\d{1,10}) of (\d{1,10})")
"""A change of num_steps: how, at which update, and the number of steps that was planned before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "lion", "adafactor", "muon", "schedule_free"] = "adamw"
    """adamw (arXiv:1711.05101), lion (arXiv:2302.06675), adafactor (arXiv:1804.04235), muon: orthogonalised momentum
    for the matrices of blocks, adam for the rest (kellerjordan.github.io/posts/muon), or schedule_free: adamw without
    decay of the rate, which evaluates an average of its iterates (arXiv:2405.15682)."""
    learning_rate: float = 6e-4
    """Peak learning rate, reached after warmup."""
    min_learning_rate: float = 6e-5
    """Final learning rate of schedules cosine, linear and wsd."""
    warmup_steps: int = 0
    """Number of steps of linear warm-up."""
    warmup_fraction: float = 0.0
    """Length of linear warm-up as a share of train.num_steps, instead of warmup_steps; 0: use warmup_steps."""
    warmup_rule: Literal["before_peak", "to_peak"] = "before_peak"
    """Learning rate at step k of W warm-up steps. before_peak: k / (W + 1) of the peak, so the step after warm-up has
    the peak; to_peak: k / W of it, so the last warm-up step has the peak."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Schedule of the learning rate after warm-up. wsd: constant, then linear over the last wsd_decay_fraction of the
    steps (arXiv:2404.06395); inverse_sqrt: proportional to 1 / sqrt(step), without an end (arXiv:1706.03762, section
    5.3)."""
    wsd_decay_fraction: float = 0.2
    """Share of train.num_steps at the end in which schedule wsd decays."""
    extend: Literal["continue", "restart", "stretch"] = "continue"
    """Learning rate of a run that resumes with another train.num_steps. continue: decays from the current value;
    restart: warms up to learning_rate again; stretch: as if the run had the new number from the start."""
    extended: tuple[str, ...] = ()
    """The changes of train.num_steps so far, written by the run itself: 'continue at 1000 of 1000' means that the
    schedule planned for 1000 steps was continued at update 1000."""
    weight_decay: float = 0.1
    """Decoupled weight decay; applied only to matrices and embeddings."""
    beta1: float = 0.9
    """Decay of the running mean of gradients; lion: weight of that mean in the update; schedule_free: weight of the
    average in the parameters at which gradients are taken."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients; lion: decay of the running mean of gradients."""
    eps: float = 1e-8
    """Epsilon of adam, added to the denominator."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices that muon trains; learning_rate is for all other parameters."""
    muon_beta: float = 0.95
    """Momentum decay of muon."""
    factored_decay: float = 0.8
    """adafactor: exponent of the decay of its second moments."""
    embedding_rate: float = 1.0
    """Factor on the learning rate of token embeddings."""
    head_rate: float = 1.0
    """Factor on the learning rate of an output projection that is not tied."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""

    def __post_init__(self):
        not_negative(
            "optim",
            self,
            "learning_rate",
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "eps",
            "grad_clip",
        )
        positive("optim", self, "muon_learning_rate", "embedding_rate", "head_rate")
        fraction("optim", self, "beta1", "beta2", "muon_beta", "factored_decay")
        if not 0 < self.wsd_decay_fraction <= 1:
            raise UserError(f"optim.wsd_decay_fraction={self.wsd_decay_fraction} must lie in (0, 1]")
        if self.schedule in ("cosine", "linear", "wsd") and self.min_learning_rate > self.learning_rate:
            raise UserError(
                f"optim.min_learning_rate={self.min_learning_rate} must not exceed"
                f" optim.learning_rate={self.learning_rate}"
            )
        no_effect("optim", self, "wsd_decay_fraction", self.schedule == "wsd", "optim.schedule=wsd")
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"optim.warmup_fraction={self.warmup_fraction} must lie in [0, 1]")
        if self.warmup_steps and self.warmup_fraction:
            raise UserError("optim.warmup_steps and optim.warmup_fraction are both set; give one")
        warms_up = bool(self.warmup_steps or self.warmup_fraction)
        no_effect("optim", self, "warmup_rule", warms_up, "optim.warmup_steps or optim.warmup_fraction")
        if self.schedule == "inverse_sqrt" and not warms_up:
            raise UserError("optim.schedule=inverse_sqrt decays from the end of warm-up; give optim.warmup_steps")
        for name in ("extend", "extended"):
            no_effect("optim", self, name, self.depends_on_length, "a schedule that depends on train.num_steps")
        for change in self.extended:
            if not EXTENSION.fullmatch(change):
                raise UserError(f"optim.extended: {change!r} must be like 'continue at 1000 of 1000'")
        ends = self.schedule in ("cosine", "linear", "wsd")
        no_effect("optim", self, "min_learning_rate", ends, "optim.schedule=cosine, linear or wsd")
        adam = self.name in ("adamw", "muon", "schedule_free")
        no_effect("optim", self, "eps", adam, "optim.name=adamw, muon or schedule_free")
        for name in ("muon_learning_rate", "muon_beta"):
            no_effect("optim", self, name, self.name == "muon", "optim.name=muon")
        no_effect("optim", self, "factored_decay", self.name == "adafactor", "optim.name=adafactor")
        for name in ("beta1", "beta2"):
            no_effect("optim", self, name, self.name != "adafactor", "moments that decay by a constant")
        if self.name == "schedule_free":
            self._check_schedule_free()
        if self.name == "muon" and not self.learning_rate:
            raise UserError("optim.learning_rate=0 with optim.name=muon: the rate of embeddings must be above 0")

    def _check_schedule_free(self) -> None:
        if self.schedule != "constant":
            raise UserError(
                f"optim.name=schedule_free does not decay the learning rate, and optim.schedule={self.schedule} does;"
                " set optim.schedule=constant"
            )
        if not self.beta1:
            raise UserError("optim.beta1=0 with optim.name=schedule_free: must lie above 0, such as 0.9")
        for name in ("embedding_rate", "head_rate"):
            no_effect("optim", self, name, False, "another optim.name: schedule_free has one rate for all parameters")

    @property
    def depends_on_length(self) -> bool:
        """Whether the learning rate of a step depends on train.num_steps."""
        return self.schedule in ("cosine", "linear", "wsd") or self.warmup_fraction > 0
