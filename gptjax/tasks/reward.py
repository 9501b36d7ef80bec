"""A reward model: scores a response to a prompt. It is trained on pairs of a chosen and a rejected response.

The probability that a response is preferred is the sigmoid of the difference of the scores (Bradley and Terry 1952),
which equals a softmax over the two scores. The loss is its negative logarithm (arXiv:2203.02155, equation 1).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.batches.labelled import CandidateSet, encode_rows, end_marks
from gptjax.config.run import Config
from gptjax.evaluation.preferences import ScorePredictions, preference_report, score_preferences
from gptjax.tasks.head_task import HeadTask, count_note, head_kind
from gptjax.tasks.task import longest
from gptjax.text.labelled import Preference
from gptjax.text.preferences import parse_preference, plain_text
from gptjax.text.tokenizers.base import Tokenizer


def outputs(predictions: ScorePredictions) -> Iterator[dict[str, Any]]:
    """The score of each response."""
    for score in predictions.scores_ES[:, 0].tolist():
        yield {"predicted": score}


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Preference]) -> CandidateSet:
    """Encodes both chats of each pair between two end-of-text tokens, the chosen one first."""
    chats = [[chat for chat in (example.chosen, example.rejected) if chat is not None] for example in examples]
    rows = [(chat.text,) for pair in chats for chat in pair]
    tokens, cut = encode_rows(rows, tokenizer, end_marks(tokenizer), longest(config))
    several = max(map(len, chats), default=1)
    numbers = np.arange(len(rows)).reshape(-1, several)
    return CandidateSet(
        [[tokens[n] for n in pair] for pair in numbers],
        np.zeros(len(numbers), np.int32),
        np.array([cut[pair].any() for pair in numbers], bool),
        longest(config),
        several,
    )


def _decode(
    _config: Config, _examples: Sequence[Preference], rows: CandidateSet, scores_ES: np.ndarray
) -> ScorePredictions:
    return ScorePredictions(scores_ES, tuple(rows.cut.tolist()))


HEAD = HeadTask(
    _encode,
    lambda _, rows: rows.candidates,
    _decode,
    score_preferences,
    functools.partial(count_note, what="pairs of responses"),
)
KIND = head_kind(HEAD, parse_preference, plain_text, outputs, preference_report)
