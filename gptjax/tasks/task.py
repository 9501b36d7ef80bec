"""The interface of a task for the training loop and the verbs. Each task implements it in its own file."""

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
    """The data of a run: a token dataset, or examples."""

    tokenizer: Tokenizer
    dataset: Dataset | None
    examples: dict[str, Examples]
    """Examples by the name of the task; the name of a single task is its kind."""
    texts: dict[str, Dataset] = dataclasses.field(default_factory=dict)
    """Datasets of the parts of multi with `task.kind: pretrain`, by name."""
    base: dict | None = None
    """Parameters of the run in `init_from`."""
    mixture: dict[str, Dataset] = dataclasses.field(default_factory=dict)
    """Datasets of a run with several sources, by name; `dataset` is then None."""
    skipped: dict[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    """Training documents without loss, by the name of the source or part; the name of a single source is empty."""


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
    """Number of batches of an evaluation; 0: unknown."""
    follow: Callable[[dict], None] | None = None
    """Called with the model's parameters before each batch is made; None: batches do not depend on them."""
    constants: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)
    """Leaves of heads that are computed from the training rows and not trained, by the name of the head."""
    measured_on: str = ""
    """Identity of the validation data: only losses and scores on the same data can be compared."""


class Kind(NamedTuple):
    """The functions of one kind of task."""

    build: Callable[[Config, str, Source, Compute, Compile], Task]
    """Arguments: config and name of the task, source, compute, and a function that compiles."""
    states_loss: Callable[[Config, str], StatesLoss]
    """The loss as a function of parameters, final hidden states `[B, T, D]`, and the batch."""
    parse_row: ParseRow | None = None
    """Parses a row to an example; None: the task uses prepared text."""
    plain_text: Callable[[Any], str] = str
    """Returns the text of an example, for training a tokenizer."""
    predict: Callable[..., tuple[Any, float]] | None = None
    """For tasks with a head: returns the predictions in the order of the examples, and the mean loss of those with
    targets. The predictions have `cut`, a bool per example."""
    outputs: Callable[[Any], Iterator[dict[str, Any]]] | None = None
    """Returns the fields that `gptjax predict` adds to each row, given the predictions."""
    report: Callable[[Any, float], str] | None = None
    """Returns the text that `gptjax evaluate` prints, given the predictions and the mean loss."""


def longest(config: Config) -> int:
    """Largest number of tokens in a text or window of a task."""
    return config.task.max_tokens or config.model.block_size


def hash_sequences(sequences: Sequence[TargetSequence]) -> str:
    """Hash of sequences and their targets."""
    return hash_arrays(array for sequence in sequences for array in (sequence.inputs, sequence.targets))


def hash_texts(texts: Iterable[str]) -> str:
    """Hash of texts, in order."""
    digest = xxhash.xxh3_128()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def hash_encoded(rows: Encoded) -> str:
    """Hash of encoded rows and their targets."""
    ids = (ids for row in rows.tokens for ids in ([row] if isinstance(row, np.ndarray) else row))
    return hash_arrays(itertools.chain(ids, [rows.targets]))


def hash_arrays(arrays: Iterable[np.ndarray]) -> str:
    """Hash of the values and shapes of arrays; integers are hashed as int32."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(np.array(array.shape, np.int64).tobytes())
        dtype = np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32
        digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return digest.hexdigest()
