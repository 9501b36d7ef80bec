"""Options of fine-tuning: what is learned, which parameters learn it, and what is added to the model for it."""

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
    """Small new parameters beside those of the model, which can stay as they are."""

    kind: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "none"
    """lora (arXiv:2106.09685), bottleneck (arXiv:1902.00751), prompt (arXiv:2104.08691), prefix (arXiv:2101.00190)."""
    rank: int = 8
    """Width of lora and bottleneck."""
    alpha: float = 16.0
    """lora's product counts alpha / rank times."""
    targets: tuple[str, ...] = ("attn/w_qkv",)
    """Weights that lora adds to: attn/w_qkv, attn/w_out, mlp/w_in, mlp/w_out."""
    dropout: float = 0.0
    """Probability of zeroing what lora and bottleneck read."""
    tokens: int = 16
    """Learned vectors that every text sees before itself: of prompt at the first layer, of prefix at each."""

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
    """What the model learns to do with its text."""

    kind: Literal["pretrain", "classify", "tag", "instruct", "multi"] = "pretrain"
    """pretrain: the next token; classify: a text's label; tag: a label for each word; instruct: responses to prompts;
    multi: the tasks in `parts` together."""
    validation_path: tuple[str, ...] = ()
    """Labelled files to validate on; none: data.validation_fraction of the rows, chosen by hash."""
    label_field: str = "label"
    """Field of classify's label; a list where a text has several."""
    tokens_field: str = "tokens"
    """Field of tag's words."""
    tags_field: str = "tags"
    """Field of tag's labels, one for each word."""
    prompt_field: str = "prompt"
    """Field of instruct's prompt."""
    response_field: str = "response"
    """Field of instruct's response."""
    messages_field: str = "messages"
    """Field of instruct's chat, a list of {role, content}; used where a row has it, instead of prompt and response."""
    template: str = "### {role}\n{content}\n\n"
    """How instruct writes a message; a prompt is one of role user, a response one of role assistant."""
    labels: tuple[str, ...] = ()
    """Label names in the order of the head's outputs; none: those of the training rows, sorted."""
    multi_label: bool = False
    """A text has any number of labels; set by itself where the data's labels are lists."""
    max_tokens: int = 0
    """Longest text of classify, or window that tag and instruct fill; 0: model.block_size."""
    pooling: Literal["last", "mean"] = "mean"
    """What classify reads: the state at the last token, or the mean over all."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: every class of classify weighs the same in the loss, however rare."""
    lookahead: int = 0
    """Tokens that tag reads past a word before it names the word's label; the model sees only what came before."""
    augment_delete: float = 0.0
    """Share of a training text's tokens that classify leaves out, others each time (arXiv:1901.11196)."""
    augment_swap: float = 0.0
    """Share of a training text's tokens that classify swaps with their neighbour."""

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
    """Which parameters learn, and how fast."""

    train: Literal["all", "new", "top", "paths"] = "all"
    """all; new: only heads and adapters; top: those and the last top_k blocks with the norm after them; paths: those
    and what `paths` names."""
    top_k: int = 2
    """Blocks that train=top trains."""
    paths: tuple[str, ...] = ()
    """Regular expressions that train=paths searches in names of parameters, such as 'norm_' or 'blocks/mlp'."""
    layer_decay: float = 1.0
    """Each block learns this much slower than the one after it, embeddings slowest (arXiv:1801.06146, section 3.2)."""
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
