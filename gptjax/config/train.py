"""Options of the training loop."""

import dataclasses
from typing import Literal

from gptjax.config.ramps import check_ramp, parse_ramp
from gptjax.config.rules import fraction, no_effect, not_negative, positive
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch size, precision, and when to log, evaluate and save."""

    num_steps: int = 1000
    """Number of steps; each is one batch and one optimizer update."""
    num_epochs: float = 0.0
    """Length of the run in epochs, instead of num_steps; 0: use num_steps. The run's config.yaml has the resulting
    num_steps."""
    batch_size: int = 16
    """Sequences per step, over all devices."""
    batch_ramp: tuple[str, ...] = ()
    """Smaller batches at first, as STEP:SEQUENCES, the first from step 0 and the last with batch_size: 0:4 500:16. Each
    size compiles a program."""
    length_ramp: tuple[str, ...] = ()
    """Shorter sequences at first, as STEP:TOKENS, the last with model.block_size: 0:64 500:256. Sequences are cut into
    pieces, so a step has as many tokens as without."""
    micro_batch_size: int = 0
    """Sequences per forward pass, over all devices; gradients are accumulated over batch_size. 0: batch_size."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of parameters and optimizer moments."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of matmul operands; float16 uses a dynamic loss scale. auto: bfloat16 if the machine has instructions for
    it, else float32; the run's config.yaml has the choice."""
    label_smoothing: float = 0.0
    """Label smoothing: share of the target that is spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the z-loss, the squared log-normalizer of the logits (arXiv:2204.02311, section 5)."""
    spike_sigma: float = 20.0
    """Skip the update of a step whose loss or gradient norm is this many standard deviations above its running mean; 0:
    never."""
    max_skipped_in_a_row: int = 10
    """Stop after this many skipped updates in a row, and write diverged.json."""
    noise_scale: bool = False
    """Log the gradient noise scale, in sequences: a larger batch than this saves few steps (arXiv:1812.06162). Needs
    train.micro_batch_size below batch_size, and computes the norm of each micro-batch's gradient."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the parameters, used for evaluation and sampling; 0: none."""
    remat: Literal["none", "dots", "full"] = "none"
    """Rematerialisation: what the backward pass recomputes. none: nothing; dots: all except matmuls; full: whole
    blocks."""
    unroll: int = 0
    """Unrolling of the loop over layers: blocks per iteration; 0: all. Higher values run faster and compile more
    slowly."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; 0: only at the end."""
    eval_windows: int = 512
    """Number of validation windows in an evaluation, evenly spaced and always the same; 0: all."""
    save_every: int = 1000
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep, in addition to the best one."""
    strict_checkpoints: bool = False
    """Stop if the newest checkpoint is damaged, instead of resuming from an older one."""
    allow_data_change: bool = False
    """Allow resuming with other data or another batch_size; training text may then be repeated."""
    best_by: Literal[
        "loss", "accuracy", "macro_f1", "span_f1", "pearson", "spearman", "exact_match", "f1", "metric"
    ] = "loss"
    """Selects the best checkpoint. loss: the lowest validation loss; others: the highest score of that name; metric:
    the value of task.metric."""
    patience: int = 0
    """Stop after this many evaluations without a new best one; 0: never."""
    sample_prompt: str = "\n"
    """Prompt of the sample at each evaluation."""
    sample_tokens: int = 64
    """Length of the sample at each evaluation, in tokens; 0: no sample."""

    def __post_init__(self):
        positive("train", self, "num_steps", "batch_size", "log_every", "keep_checkpoints", "max_skipped_in_a_row")
        not_negative(
            "train",
            self,
            "micro_batch_size",
            "unroll",
            "eval_every",
            "eval_windows",
            "save_every",
            "patience",
        )
        not_negative("train", self, "z_loss", "sample_tokens", "spike_sigma", "num_epochs")
        no_effect("train", self, "num_steps", not self.num_epochs, "train.num_epochs=0")
        no_effect("train", self, "patience", self.eval_every > 0, "train.eval_every above 0")
        fraction("train", self, "label_smoothing", "ema")
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"train.batch_size={self.batch_size} must be divisible by"
                f" train.micro_batch_size={self.micro_batch_size}"
            )
        if self.batch_ramp:
            check_ramp("train.batch_ramp", self.batch_sizes, "train.batch_size", self.batch_size)
            for _, size in self.batch_sizes:
                if size % (self.micro_batch_size or size):
                    raise UserError(
                        f"train.batch_ramp: {size} sequences must be divisible by"
                        f" train.micro_batch_size={self.micro_batch_size}"
                    )
            no_effect("train", self, "num_epochs", False, "train.batch_ramp=(); give train.num_steps")
        if self.noise_scale and self.micro_batch == self.batch_size:
            raise UserError(
                "train.noise_scale=true compares gradients of two batch sizes: set train.micro_batch_size to less than"
                f" train.batch_size={self.batch_size}"
            )
        if self.sample_tokens and not self.sample_prompt:
            raise UserError("train.sample_prompt is empty; give a text, or train.sample_tokens=0 for no samples")

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass, with the default resolved."""
        return self.micro_batch_size or self.batch_size

    @property
    def batch_sizes(self) -> tuple[tuple[int, int], ...]:
        """Sequences per step: pairs of a step and the number from that step on."""
        return parse_ramp("train.batch_ramp", self.batch_ramp) or ((0, self.batch_size),)

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Tokens per sequence: pairs of a step and the number from that step on; empty: always model.block_size."""
        return parse_ramp("train.length_ramp", self.length_ramp)
