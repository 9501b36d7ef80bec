"""Options of fine-tuning: the task, the trainable parameters, and adapters."""

import dataclasses
import re
from typing import Literal

from gptjax.config.rules import fraction, no_effect, not_negative, positive
from gptjax.errors import UserError, did_you_mean

LABELLED = ("classify", "tag")
"""Tasks with a head of their own."""
LORA_TARGETS = ("attn/w_qkv", "attn/w_out", "mlp/w_in", "mlp/w_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """A small set of new parameters; those of the model can stay frozen."""

    kind: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "none"
    """lora (arXiv:2106.09685), bottleneck (arXiv:1902.00751), prompt (arXiv:2104.08691), prefix (arXiv:2101.00190)."""
    rank: int = 8
    """Width of lora and bottleneck."""
    alpha: float = 16.0
    """lora's update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("attn/w_qkv",)
    """Weights that lora is added to: attn/w_qkv, attn/w_out, mlp/w_in, mlp/w_out."""
    dropout: float = 0.0
    """Dropout on the input of lora and bottleneck."""
    tokens: int = 16
    """Learned vectors before each text: of prompt at the first layer, of prefix at every layer."""

    def __post_init__(self):
        section = "model.adapter"
        positive(section, self, "rank", "tokens", "alpha")
        fraction(section, self, "dropout")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise UserError(
                    f"model.adapter.targets: {target!r} must be one of {', '.join(LORA_TARGETS)}."
                    f"{did_you_mean(target, LORA_TARGETS)}"
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError("model.adapter.targets must name each target once, and at least one")
        lora, thin = self.kind == "lora", self.kind in ("lora", "bottleneck")
        no_effect(section, self, "rank", thin, "model.adapter.kind=lora or bottleneck")
        no_effect(section, self, "dropout", thin, "model.adapter.kind=lora or bottleneck")
        no_effect(section, self, "alpha", lora, "model.adapter.kind=lora")
        no_effect(section, self, "targets", lora, "model.adapter.kind=lora")
        no_effect(section, self, "tokens", self.kind in ("prompt", "prefix"), "model.adapter.kind=prompt or prefix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the model is trained to do."""

    kind: Literal["pretrain", "classify", "tag", "instruct", "multi"] = "pretrain"
    """pretrain: the next token; classify: a text's label; tag: a label for each word; instruct: responses to prompts;
    multi: the tasks in `parts` together."""
    validation_path: tuple[str, ...] = ()
    """Labelled files for validation; none: data.validation_fraction of the rows, chosen by hash."""
    label_field: str = "label"
    """Field of classify's label; a list for several labels a text."""
    tokens_field: str = "tokens"
    """Field of tag's words."""
    tags_field: str = "tags"
    """Field of tag's labels, one for each word."""
    prompt_field: str = "prompt"
    """Field of instruct's prompt."""
    response_field: str = "response"
    """Field of instruct's response."""
    messages_field: str = "messages"
    """Field of instruct's chat, a list of {role, content}; where a row has it, prompt and response are not read."""
    template: str = "### {role}\n{content}\n\n"
    """Text of one message of instruct; a prompt has role user, a response role assistant."""
    labels: tuple[str, ...] = ()
    """Labels in the order of the head's outputs; none: those of the training rows, sorted."""
    multi_label: bool = False
    """A text has any number of labels; set automatically where the data's labels are lists."""
    max_tokens: int = 0
    """Longest text of classify, or window into which tag and instruct are packed; 0: model.block_size."""
    pooling: Literal["last", "mean"] = "mean"
    """Input of classify's head: the hidden state of the last token, or the mean over all."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every class of classify has the same weight in the loss, however rare."""
    lookahead: int = 0
    """Tokens after a word that tag reads before it predicts the word's label; attention is causal."""
    augment_delete: float = 0.0
    """Share of a training text's tokens that classify drops at random (arXiv:1901.11196)."""
    augment_swap: float = 0.0
    """Share of a training text's tokens that classify swaps with the next one at random."""

    def __post_init__(self):
        not_negative("task", self, "max_tokens", "lookahead")
        fraction("task", self, "augment_delete", "augment_swap")
        classify, tag, instruct = (f"task.kind={kind}" for kind in ("classify", "tag", "instruct"))
        for needs, names in {
            classify: ("label_field", "multi_label", "pooling", "class_weights", "augment_delete", "augment_swap"),
            tag: ("tokens_field", "tags_field", "lookahead"),
            instruct: ("prompt_field", "response_field", "messages_field", "template"),
        }.items():
            for name in names:
                no_effect("task", self, name, f"task.kind={self.kind}" == needs, needs)
        labelled, rows = self.kind in LABELLED, self.kind not in ("pretrain", "multi")
        no_effect("task", self, "labels", labelled, "task.kind=classify or tag")
        for name in ("validation_path", "max_tokens"):
            no_effect("task", self, name, rows, "task.kind=classify, tag or instruct")
        if self.multi_label and self.class_weights != "none":
            raise UserError("task.class_weights=balanced needs one label a text; leave it out where there are several")
        if len(set(self.labels)) < len(self.labels):
            raise UserError("task.labels names a label twice")
        for part in ("{role}", "{content}"):
            if self.template.count(part) != 1:
                raise UserError(f"task.template={self.template!r} must hold {part} once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Which parameters are trainable, and their learning rates."""

    train: Literal["all", "new", "top", "paths"] = "all"
    """Trainable parameters. all; new: only heads and adapters; top: those, the last top_k blocks and the final norm;
    paths: heads, adapters and the parameters that `paths` matches."""
    top_k: int = 2
    """Number of blocks that train=top trains."""
    paths: tuple[str, ...] = ()
    """Regular expressions that train=paths searches in parameter names, such as 'norm_' or 'blocks/mlp'."""
    layer_decay: float = 1.0
    """Factor of a block's learning rate relative to the block above it (arXiv:1801.06146, section 3.2)."""
    head_learning_rate: float = 0.0
    """Peak learning rate of heads; 0: optim.learning_rate."""

    def __post_init__(self):
        positive("finetune", self, "top_k")
        not_negative("finetune", self, "head_learning_rate")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"finetune.layer_decay={self.layer_decay} must lie in (0, 1]")
        no_effect("finetune", self, "top_k", self.train == "top", "finetune.train=top")
        no_effect("finetune", self, "paths", self.train == "paths", "finetune.train=paths")
        for pattern in self.paths:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"finetune.paths: {pattern!r} is no regular expression: {error}") from None
        if self.train == "paths" and not self.paths:
            raise UserError("finetune.paths is empty; finetune.train=paths trains what it names")
