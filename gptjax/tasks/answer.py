"""Extractive question answering: the head predicts the first and the last token of the answer in a text.

The input is: start token, question, delimiter, a window of the text, extract token. Position 0 means "no answer".

Shape suffixes: B windows, T and S position, D n_embd.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.spans import SpanBatch, SpanSet, encode_questions
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.evaluation.answers import AnswerPredictions, answer_report, score_answers
from gptjax.evaluation.predict import Predict
from gptjax.model.gpt import Compute
from gptjax.model.heads import head_logits, label_loss
from gptjax.ops.cross_entropy import Loss
from gptjax.tasks.head_task import HeadTask, head_kind
from gptjax.tasks.heads import NO_CANDIDATE, states_of, with_language_model
from gptjax.tasks.task import StatesLoss, longest
from gptjax.tasks.texts import marks_of
from gptjax.text.answers import Question, parse_question
from gptjax.text.labelled import Examples
from gptjax.text.tokenizers.base import Tokenizer

LONGEST_ANSWER = 30
"""Largest number of tokens in a predicted answer, as in BERT's script for SQuAD."""


def span_states_loss(config: Config, name: str) -> StatesLoss:
    """The mean of the cross-entropies of the answer's first and last token."""

    def states_loss(params: dict, x_BTD: jax.Array, batch: SpanBatch) -> Loss:
        loss = span_loss(span_logits(params["heads"][name], x_BTD, batch), batch, config.train.label_smoothing)
        return with_language_model(config, params, x_BTD, batch, loss)

    return states_loss


def span_logits(head: dict, x_BTD: jax.Array, batch: SpanBatch) -> jax.Array:
    """Float32 logits `[B, 2, T]` of the answer's first and last token; only tokens of the text and position 0 are
    possible.
    """
    positions_1T = jnp.arange(x_BTD.shape[1])[None]
    inside_BT = (positions_1T >= batch.firsts[:, None]) & (positions_1T < batch.lengths[:, None] - 1)
    allowed_BT = inside_BT | (positions_1T == 0)
    return jnp.where(allowed_BT[:, None], jnp.swapaxes(head_logits(head, x_BTD), 1, 2), NO_CANDIDATE)


def span_loss(logits_B2T: jax.Array, batch: SpanBatch, smoothing: float = 0.0) -> Loss:
    """Sums the losses of the first and the last token, each with weight 1/2."""
    halves_B2 = jnp.stack([batch.weights, batch.weights], axis=1) / 2
    return label_loss(logits_B2T, batch.targets, halves_B2, smoothing)


def make_predict(model: ModelConfig, task: TaskConfig, name: str, compute: Compute) -> Predict:
    """Returns `predict(params, batch) -> (best [B, 4], [nll, count])`, to be jitted. `best` holds the first and last
    position of the most likely span, the sum of its logits, and the sum of the logits of "no answer".
    """

    def predict(params: dict, batch: SpanBatch) -> tuple[jax.Array, jax.Array]:
        x_BTD, _ = states_of(model, task, params, name, batch, compute)
        logits_B2T = span_logits(params["heads"][name], x_BTD, batch)
        loss = span_loss(logits_B2T, batch)
        return best_spans(logits_B2T), jnp.stack([loss.nll, loss.count])

    return predict


def best_spans(logits_B2T: jax.Array) -> jax.Array:
    """See `make_predict`."""
    T = logits_B2T.shape[-1]
    sums_BTS = logits_B2T[:, 0, :, None] + logits_B2T[:, 1, None, :]
    length_TS = jnp.arange(T)[None] - jnp.arange(T)[:, None]
    possible_TS = (length_TS >= 0) & (length_TS < LONGEST_ANSWER) & (jnp.arange(T) > 0)[:, None]
    flat_BN = jnp.where(possible_TS[None], sums_BTS, 3 * NO_CANDIDATE).reshape(logits_B2T.shape[0], -1)
    first_B, last_B = jnp.divmod(jnp.argmax(flat_BN, axis=-1), T)
    return jnp.stack([first_B, last_B, jnp.max(flat_BN, axis=-1), sums_BTS[:, 0, 0]], axis=-1).astype("float32")


def outputs(predictions: AnswerPredictions) -> Iterator[dict[str, Any]]:
    """The answer to each question and the character at which it begins; an empty text and -1 for "no answer"."""
    for answer, start in zip(predictions.predicted, predictions.starts, strict=True):
        yield {"predicted": answer, "answer_start": start}


def _encode(config: Config, tokenizer: Tokenizer, examples: Sequence[Question]) -> SpanSet:
    return encode_questions(examples, tokenizer, marks_of(config, tokenizer), longest(config), config.task.stride)


def _decode(config: Config, examples: Sequence[Question], rows: SpanSet, best: np.ndarray) -> AnswerPredictions:
    """The best span over all windows of each question. With `task.no_answer`, the answer is empty if "no answer" has a
    higher score in every window.
    """
    answers, starts = [""] * len(examples), [-1] * len(examples)
    highest, none = np.full(len(examples), -np.inf), np.full(len(examples), np.inf)
    several = [False] * len(examples)
    for window, (first, last, score, nothing), cut in zip(rows.windows, best.tolist(), rows.cut.tolist(), strict=True):
        number = window.question
        none[number], several[number] = min(none[number], nothing), cut
        if score > highest[number]:
            highest[number] = score
            raw = examples[number].text.encode()
            begin, end = window.offsets[int(first) - window.first], window.offsets[int(last) - window.first + 1]
            answer = raw[begin:end].decode(errors="ignore")
            answers[number] = answer.strip()
            begin += len(answer.encode()) - len(answer.lstrip().encode())
            starts[number] = len(raw[:begin].decode(errors="ignore"))
    if config.task.no_answer:
        for number in np.flatnonzero(none > highest).tolist():
            answers[number], starts[number] = "", -1
    truth = tuple(example.answers for example in examples)
    return AnswerPredictions(tuple(answers), tuple(starts), truth, tuple(several))


def _note(config: Config, examples: Examples, train: SpanSet, _validation: SpanSet) -> str:
    without = int((train.targets[:, 0] == 0).sum())
    return (
        f"{len(examples.train):,} questions, {len(examples.validation):,} to validate on; {len(train.tokens):,} windows"
        f" of {longest(config)} tokens, {without:,} of them without the answer"
    )


HEAD = HeadTask(_encode, lambda *_: 4, _decode, score_answers, _note, make_predict=make_predict)
KIND = head_kind(
    HEAD,
    parse_question,
    lambda example: f"{example.question}\n{example.text}",
    outputs,
    answer_report,
    span_states_loss,
)
