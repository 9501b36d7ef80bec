"""The interface of a task for the training loop and the verbs; each task implements it in a file of its own."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash

from gptjax.batches.labelled import Encoded
from gptjax.batches.multi import Windows
from gptjax.batches.packed import TargetSequence
from gptjax.config.run import Config
from gptjax.evaluation.answers import AnswerScores
from gptjax.evaluation.choices import ChoiceScores
from gptjax.evaluation.labels import LabelScores, MultiScores
from gptjax.evaluation.loss import Evaluation, MixtureEvaluation
from gptjax.evaluation.metric import ScoresWithMetric
from gptjax.evaluation.numbers import NumberScores
from gptjax.evaluation.preferences import PreferenceScores
from gptjax.evaluation.rewards import RewardScores
from gptjax.model.gpt import Compute
from gptjax.ops.cross_entropy import Loss
from gptjax.text.labelled import Examples, ParseRow
from gptjax.text.shards import Dataset
from gptjax.text.tokenizers.base import Tokenizer

Scores = (
    Evaluation
    | MixtureEvaluation
    | LabelScores
    | NumberScores
    | ChoiceScores
    | AnswerScores
    | PreferenceScores
    | RewardScores
    | ScoresWithMetric
    | MultiScores
)
Compile = Callable[[Callable], Callable]
LossFunction = Callable[[dict, Any, jax.Array | None], Loss]
StatesLoss = Callable[[dict, jax.Array, Any], Loss]


@dataclasses.dataclass(frozen=True)
class Source:
    """The data of a run: tokens of text, or examples."""

    tokenizer: Tokenizer
    dataset: Dataset | None
    examples: dict[str, Examples]
    """By the name of the task's part; a task alone has its kind as name."""
    base: dict | None = None
    """Parameters of the run that `init_from` names."""
    mixture: dict[str, Dataset] = dataclasses.field(default_factory=dict)
    """The sources of a run that mixes several, by name; `dataset` is None then."""
    skipped: dict[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    """Training documents in which no loss is taken, by the name of the source; that of a single one is empty."""


@dataclasses.dataclass(frozen=True)
class Task:
    """The interface of a task for the training loop."""

    windows: Windows
    tokens_per_row: float
    """Mean number of tokens in a sequence of a batch."""
    data_hash: str
    evaluate: Callable[[dict, jax.sharding.Sharding], Scores]
    notes: tuple[str, ...] = ()
    """Log lines about the examples."""
    evaluation_batches: int = 0
    """Batches of an evaluation; 0: unknown."""
    follow: Callable[[dict], None] | None = None
    """Takes the model's parameters before each batch is made; None: batches do not depend on them."""
    measured_on: str = ""
    """Identity of the validation data: only losses and scores on the same data can be compared."""


class Kind(NamedTuple):
    """The functions of one kind of task."""

    build: Callable[[Config, str, Source, Compute, Compile], Task]
    """From the config of the part, its name, what was read, precision and layout, and a function that compiles."""
    states_loss: Callable[[Config, str], StatesLoss]
    """The loss as a function of parameters, final hidden states `[B, T, D]`, and the batch."""
    parse_row: ParseRow | None = None
    """Makes an example of a row; None: the task learns from prepared text."""
    plain_text: Callable[[Any], str] = str
    """The text of an example, for training a tokenizer."""
    predict: Callable[..., tuple[Any, float]] | None = None
    """For tasks with a head: see `classify.predict`. What is predicted has `cut`, of each example."""
    outputs: Callable[[Any], Iterator[dict[str, Any]]] | None = None
    """Makes of what is predicted the fields that `gptjax predict` adds to each row."""
    report: Callable[[Any, float], str] | None = None
    """Makes of what is predicted, and the mean loss, the text of `gptjax evaluate`."""


def longest(config: Config) -> int:
    """Tokens of the longest text or window of a task."""
    return config.task.max_tokens or config.model.block_size


def hash_sequences(sequences: Sequence[TargetSequence]) -> str:
    """Identity of sequences and their targets."""
    return hash_arrays(array for sequence in sequences for array in (sequence.inputs, sequence.targets))


def hash_texts(texts: Iterable[str]) -> str:
    """Identity of texts in their order."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def hash_encoded(rows: Encoded) -> str:
    """Identity of encoded rows and their targets."""
    ids = (ids for row in rows.tokens for ids in ([row] if isinstance(row, np.ndarray) else row))
    return hash_arrays(itertools.chain(ids, [rows.targets]))


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
    """Identity of numbers in arrays and of the arrays' shapes; whole numbers count as int32."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.array(array.shape, np.int64).tobytes())
        dtype = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32
        digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return digest.hexdigest()
