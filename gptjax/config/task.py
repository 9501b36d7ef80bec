"""Options of fine-tuning: the task, the trainable parameters, and adapters."""

import dataclasses
import re
from typing import Literal

from gptjax.config.objective import ObjectiveConfig
from gptjax.config.rules import fraction, import_path, no_effect, not_negative, positive
from gptjax.errors import UserError, did_you_mean

LABELLED = ("classify", "tag")
"""Tasks with a classification head."""
WHOLE_TEXTS = ("classify", "regress", "choose", "reward")
"""Tasks with a head for whole texts, pairs or candidates."""
PADDED = (*WHOLE_TEXTS, "answer", "dpo", "reinforce", "seq2seq")
"""Tasks whose sequences are padded at the end; other tasks pack their sequences."""
SEVERAL = ("choose", "reward", "dpo")
"""Tasks whose rows have several sequences."""
CHATS = ("instruct", "dpo", "reinforce")
"""Tasks that train responses to prompts."""
TEMPLATED = ("instruct", "reward", "dpo", "reinforce")
"""Tasks that format prompts and responses with `task.template`."""
HEADED = (*WHOLE_TEXTS, "tag", "answer")
"""Tasks with a separate head."""
LORA_TARGETS = ("attn/w_qkv", "attn/w_out", "mlp/w_in", "mlp/w_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter: a small set of new parameters. The model's own parameters can stay frozen."""

    kind: Literal["none", "lora", "bottleneck", "prompt", "prefix"] = "none"
    """lora (arXiv:2106.09685), bottleneck (arXiv:1902.00751), prompt (arXiv:2104.08691), prefix (arXiv:2101.00190)."""
    rank: int = 8
    """Rank of lora, or width of the bottleneck."""
    alpha: float = 16.0
    """For lora: the update is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("attn/w_qkv",)
    """Weights with lora: attn/w_qkv, attn/w_out, mlp/w_in, mlp/w_out."""
    dropout: float = 0.0
    """Dropout on the input of lora and bottleneck."""
    tokens: int = 16
    """Number of learned vectors before each text, for prompt (at the input) and prefix (at every layer)."""

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
    """The training task and its options."""

    kind: Literal[
        "pretrain",
        "classify",
        "regress",
        "choose",
        "tag",
        "answer",
        "instruct",
        "reward",
        "dpo",
        "reinforce",
        "seq2seq",
        "multi",
    ] = "pretrain"
    """pretrain: the next token; classify: a text's label; regress: a text's number or numbers; choose: the right one of
    several candidates; tag: a label for each word; answer: the part of a text that answers a question; instruct:
    responses to prompts; reward: a score for responses, from pairs of which one was preferred; dpo: to prefer such
    responses (arXiv:2305.18290); reinforce: responses that a function of yours rewards (arXiv:2402.03300); seq2seq: a
    target text for a source text, with model.encoder_layers; multi: the tasks in `parts`."""
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    validation_path: tuple[str, ...] = ()
    """Labelled files for validation; empty: a share data.validation_fraction of the rows, chosen by hash."""
    folds: int = 0
    """Split the rows into this many folds by a hash of their text, for cross-validation; 0: none."""
    fold: int = 0
    """The fold that is held out for validation, from 0."""
    label_field: str = "label"
    """Field of the label. classify: a list for several labels a text; regress: a number or a list of numbers; choose:
    the number of the right candidate, from 0, or its text."""
    second_field: str = ""
    """Field of the second text, for classify and regress on pairs; empty: rows have only the text of
    data.text_field."""
    both_orders: bool = False
    """The head reads the sum of the representations of both orders of a pair (GPT-1, section 3.3: similarity)."""
    candidates_field: str = "candidates"
    """Field of choose's candidates, a list of texts; each is read after the text of data.text_field."""
    delimiters: Literal["end_of_text", "learned"] = "end_of_text"
    """Tokens before, between and after the texts of a row. end_of_text: the tokenizer's; learned: three new tokens
    (start, delimiter, extract) whose embeddings belong to the head (GPT-1, section 3.3)."""
    tokens_field: str = "tokens"
    """Field with the list of words, for task.kind=tag."""
    tags_field: str = "tags"
    """Field with the list of tags, one per word, for task.kind=tag."""
    prompt_field: str = "prompt"
    """Field of the prompt of instruct, reward, dpo and reinforce."""
    response_field: str = "response"
    """Field of instruct's response, and of the response that a reward model scores."""
    chosen_field: str = "chosen"
    """Field of the response that was preferred."""
    rejected_field: str = "rejected"
    """Field of the other response."""
    question_field: str = "question"
    """Field of the question of answer, about the text of data.text_field."""
    answers_field: str = "answers"
    """Field of the answers of answer, as in SQuAD: {text: [...], answer_start: [...]}; or a text that occurs in the
    context."""
    stride: int = 32
    """For answer: overlap in tokens of two windows, if a text does not fit in one window."""
    no_answer: bool = False
    """For answer: allow rows without answers and empty predictions (SQuAD 2)."""
    beta: float = 0.1
    """For dpo: how close the model stays to init_from; higher is closer (arXiv:2305.18290, equation 7)."""
    source_field: str = "source"
    """Field with the source text, for task.kind=seq2seq."""
    target_field: str = "target"
    """Field with the target text, for task.kind=seq2seq."""
    messages_field: str = "messages"
    """Field of instruct's chat, a list of {role, content}. If a row has it, prompt and response are not used."""
    template: str = "### {role}\n{content}\n\n"
    """Chat template of one message, for instruct, reward, dpo and reinforce. A prompt has role user, a response role
    assistant."""
    labels: tuple[str, ...] = ()
    """Labels in the order of the head's outputs; empty: the sorted labels of the training rows."""
    multi_label: bool = False
    """A text has any number of labels; set automatically where the data's labels are lists."""
    max_tokens: int = 0
    """Longest text of a row in tokens, or the window of tag and instruct; 0: model.block_size."""
    pooling: Literal["last", "mean"] = "mean"
    """Input of a head for whole texts: the hidden state of the last token, or the mean over all tokens."""
    layer_mixture: bool = False
    """The head reads a sum of the outputs of all layers with learned weights, instead of the last layer (ELMo,
    arXiv:1802.05365, equation 1)."""
    bag_of_words: int = 0
    """For classify: add a linear model over TF-IDF weighted n-grams of up to this many words, and of characters
    (arXiv:1606.07792); 0: none."""
    bag_share: float = 0.75
    """Share of the n-grams in the logits of a prediction, with task.bag_of_words; the other share is the model's."""
    lm_weight: float = 0.0
    """Weight of an auxiliary next-token loss on the texts (GPT-1, section 3.2)."""
    means: tuple[float, ...] = ()
    """Means of regress's training numbers, written by the run itself; the head predicts standardized numbers."""
    deviations: tuple[float, ...] = ()
    """Standard deviations of regress's training numbers, written by the run itself."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weights of classes in the loss of classify. balanced: every class has the same total weight."""
    lookahead: int = 0
    """For tag: number of tokens after a word before its label is predicted (attention is causal)."""
    reward: str = ""
    """Your reward function for reinforce, as module:function. It gets a row (a dict) and a response (a text) and
    returns a number."""
    group_size: int = 8
    """For reinforce: number of responses sampled for each prompt."""
    response_tokens: int = 64
    """For reinforce: longest response, in tokens."""
    kl_weight: float = 0.04
    """For reinforce: weight of the KL divergence from the model of init_from; 0: none."""
    metric: str = ""
    """Your metric, as module:function. It gets predicted and true values (two lists) and returns a number or a dict of
    numbers. The module may be in the current folder."""
    loss: str = ""
    """Your loss instead of the task's, as module:function. It gets the head's outputs and the targets (JAX arrays) and
    returns the loss of each row (for tag: of each word)."""
    rows: str = ""
    """Your function that changes each row, as module:function. It gets a dict and returns a dict, or None to leave the
    row out."""
    synonyms: str = ""
    """File of synonyms for augment_synonyms: each line has words with the same meaning, separated by tabs."""
    augment_synonyms: float = 0.0
    """Share of the words in task.synonyms that classify and regress randomly replace by a synonym in training texts
    (arXiv:1901.11196)."""
    augment_delete: float = 0.0
    """Share of a training text's tokens that classify and regress drop at random (arXiv:1901.11196)."""
    augment_swap: float = 0.0
    """Share of a training text's tokens that classify and regress swap with the next one at random."""

    def __post_init__(self):
        not_negative("task", self, "bag_of_words", "max_tokens", "lookahead", "lm_weight", "stride", "kl_weight")
        positive("task", self, "response_tokens")
        for name in ("metric", "loss", "rows", "reward"):
            import_path("task", self, name)
        if self.kind == "reinforce" and not self.reward:
            raise UserError(
                "task.reward is missing; name a function of a row and a response, such as my_file:my_reward"
            )
        if self.layer_mixture and self.lm_weight:
            raise UserError(
                f"task.lm_weight={self.lm_weight} reads the last layer, task.layer_mixture=true all of them; leave one"
                " out"
            )
        if self.group_size < 2:
            raise UserError(f"task.group_size={self.group_size} must be at least 2: responses are compared")
        if self.beta <= 0:
            raise UserError(f"task.beta={self.beta} must be above 0")
        fraction("task", self, "augment_delete", "augment_swap", "augment_synonyms")
        if not 0 <= self.bag_share <= 1:
            raise UserError(f"task.bag_share={self.bag_share} must lie in [0, 1]")
        not_negative("task", self, "folds", "fold")
        texts = ("classify", "regress")
        for kinds, names in {
            ("classify",): ("multi_label", "class_weights", "bag_of_words"),
            ("regress",): ("means", "deviations"),
            ("choose",): ("candidates_field",),
            ("tag",): ("tokens_field", "tags_field", "lookahead"),
            ("instruct",): ("messages_field",),
            ("seq2seq",): ("source_field", "target_field"),
            ("dpo",): ("beta",),
            ("reinforce",): ("reward", "group_size", "response_tokens", "kl_weight"),
            ("answer",): ("question_field", "answers_field", "stride", "no_answer"),
            ("instruct", "reward"): ("response_field",),
            ("reward", "dpo"): ("chosen_field", "rejected_field"),
            TEMPLATED: ("prompt_field", "template"),
            texts: ("second_field", "augment_delete", "augment_swap", "augment_synonyms"),
            LABELLED: ("labels",),
            (*texts, "choose"): ("label_field",),
            (*texts, "choose", "answer"): ("delimiters",),
            WHOLE_TEXTS: ("pooling",),
            HEADED: ("lm_weight", "layer_mixture"),
            (*texts, "choose", "tag"): ("loss",),
            (*texts, "choose", "tag", "answer"): ("metric",),
            (*HEADED, "instruct", "dpo", "reinforce", "seq2seq"): ("validation_path", "max_tokens", "rows", "folds"),
        }.items():
            for name in names:
                no_effect("task", self, name, self.kind in kinds, f"task.kind={_either(kinds)}")
        no_effect("task.objective", self.objective, "kind", self.kind == "pretrain", "task.kind=pretrain")
        no_effect("task", self, "both_orders", bool(self.second_field), "task.second_field")
        no_effect("task", self, "bag_of_words", not self.both_orders, "one order of a pair (task.both_orders=false)")
        no_effect("task", self, "bag_share", self.bag_of_words > 0, "task.bag_of_words")
        no_effect("task", self, "fold", self.folds > 0, "task.folds")
        no_effect("task", self, "synonyms", self.augment_synonyms > 0, "task.augment_synonyms")
        if self.augment_synonyms and not self.synonyms:
            raise UserError(f"task.augment_synonyms={self.augment_synonyms} needs a file: set task.synonyms")
        if self.folds == 1:
            raise UserError("task.folds=1 must be at least 2, or 0 for no folds")
        if self.folds and self.fold >= self.folds:
            raise UserError(f"task.fold={self.fold} must be below task.folds={self.folds}; the first fold is 0")
        if self.folds and self.validation_path:
            raise UserError(
                f"task.folds={self.folds} and task.validation_path both say which rows are held out; leave one out"
                " (--task.validation_path '[]' empties that of a config file)"
            )
        if self.second_field and (self.augment_delete or self.augment_swap or self.augment_synonyms):
            raise UserError(
                "task.augment_delete, augment_swap and augment_synonyms are for rows of one text; leave them out with"
                f" task.second_field={self.second_field!r}"
            )
        if len(self.means) != len(self.deviations) or any(value <= 0 for value in self.deviations):
            raise UserError("task.means and task.deviations must be of one length, and deviations above 0")
        if self.multi_label and self.class_weights != "none":
            raise UserError("task.class_weights=balanced needs one label a text; leave it out where there are several")
        if len(set(self.labels)) < len(self.labels):
            raise UserError("task.labels names a label twice")
        for part in ("{role}", "{content}"):
            if self.template.count(part) != 1:
                raise UserError(f"task.template={self.template!r} must hold {part} once")


def _either(names: tuple[str, ...]) -> str:
    """Joins names as alternatives: "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Trainable parameters and their learning rates."""

    train: Literal["all", "new", "top", "paths"] = "all"
    """Trainable parameters. all: all; new: only heads and adapters; top: also the last top_k blocks and the final norm;
    paths: heads, adapters and the parameters that paths matches."""
    top_k: int = 2
    """Number of blocks that train=top trains."""
    paths: tuple[str, ...] = ()
    """Regular expressions for names of trainable parameters with train=paths, such as 'norm_' or 'blocks/mlp'."""
    layer_decay: float = 1.0
    """Factor of a block's learning rate relative to the block above it (arXiv:1801.06146, section 3.2)."""
    base_rate: float = 0.0
    """Peak learning rate as a share of that of the run in init_from, such as 0.1; 0: use optim.learning_rate."""
    mixout: float = 0.0
    """Mixout: share of the weights that each forward pass in training replaces by those of init_from
    (arXiv:1909.11299)."""
    head_learning_rate: float = 0.0
    """Peak learning rate of heads; 0: optim.learning_rate."""

    def __post_init__(self):
        positive("finetune", self, "top_k")
        not_negative("finetune", self, "head_learning_rate", "base_rate")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"finetune.layer_decay={self.layer_decay} must lie in (0, 1]")
        fraction("finetune", self, "mixout")
        no_effect("finetune", self, "mixout", self.train == "all", "finetune.train=all")
        no_effect("finetune", self, "top_k", self.train == "top", "finetune.train=top")
        no_effect("finetune", self, "paths", self.train == "paths", "finetune.train=paths")
        for pattern in self.paths:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"finetune.paths: {pattern!r} is no regular expression: {error}") from None
        if self.train == "paths" and not self.paths:
            raise UserError("finetune.paths is empty; finetune.train=paths trains what it names")
