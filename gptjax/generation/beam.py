"""Beam search: finds continuations of high total log-probability.

Shape suffixes: P prompt, B beam (of all prompts), N candidates of a prompt, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.decoding import token_biases
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.choose import Numbers, Rule, choice_numbers, choice_rule
from gptjax.generation.controls import History, Tables, control, make_history, make_tables, remember
from gptjax.generation.decode import NOTHING, check_prompts, next_logits, prefilled, prepare, window_slots
from gptjax.generation.weights import DecodingWeights
from gptjax.model.cache import Cache, select_rows

IMPOSSIBLE = np.float32(-1e9)
"""Score of a candidate that must not be chosen."""


def beam_search(
    config: ModelConfig,
    params: dict,
    prompts: Sequence[np.ndarray],
    options: SampleConfig,
    *,
    end_of_text: int | None = None,
    bad_words: Sequence[Sequence[int]] = (),
    notify: Callable[[str], None] = lambda message: None,
    prefix: bool = False,
) -> list[list[np.ndarray]]:
    """Returns the `options.num_samples` best continuations of each prompt, best first, without end-of-text.

    Each step keeps the `num_beams` continuations with the highest sums of log-probabilities. A continuation that ends
    is stored with its score: the sum divided by its length to the power `length_penalty`. The search ends at
    `max_new_tokens`, or when no continuation of the current length would beat the worst of `num_beams` stored ones.

    Arguments are those of `decode.stream`.

    Raises:
        UserError: As `decode.stream`, or a prompt and its new tokens do not fit in the context.
    """
    check_prompts(config, prompts, options)
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + options.max_new_tokens > config.block_size + 1:
            raise UserError(
                f"num_beams={options.num_beams}: prompt {number} has {len(prompt)} tokens, and max_new_tokens="
                f"{options.max_new_tokens} more do not fit in model.block_size={config.block_size}; ask for fewer"
            )
    stop = NOTHING if end_of_text is None or options.ignore_end_of_text else end_of_text
    beams, rule = options.num_beams, choice_rule(options, words=bool(bad_words))
    searches = [_Search(options, config.vocab_size, stop) for _ in prompts]
    contexts = [np.asarray(prompt, np.int32) for prompt in prompts]
    model = prepare(config, params, options, len(prompts) * beams, prefix)
    slots = window_slots(model.config, contexts, options.max_new_tokens)
    cache = select_rows(prefilled(model, contexts, slots), np.repeat(np.arange(len(prompts)), beams))
    rows = [context for context in contexts for _ in range(beams)]
    tables = make_tables(rule, token_biases(options), bad_words, config.vocab_size)
    history = make_history(rule, rows, options.max_new_tokens, config.vocab_size)
    numbers, last_B = choice_numbers(options, len(rows)), np.array([row[-1] for row in rows], np.int32)
    for number in range(options.max_new_tokens):
        scores_B = np.concatenate([search.scores for search in searches])
        places = np.int32(number), np.full(len(rows), stop, np.int32)
        cache, sums_PN, places_PN = _best(
            *(model.config, model.dtype, rule, beams, model.weights, cache, history, last_B, scores_B),
            *(*places, numbers, tables),
        )
        chosen = [
            search.advance(sums_N, places_N)
            for search, sums_N, places_N in zip(searches, np.asarray(sums_PN), np.asarray(places_PN), strict=True)
        ]
        if not any(search.improvable for search in searches):
            break
        parents_B = np.concatenate([parents + number * beams for number, (parents, _) in enumerate(chosen)])
        last_B = np.concatenate([tokens for _, tokens in chosen])
        cache, history = _follow(cache, history, parents_B, last_B)
    return [search.best(options.num_samples) for search in searches]


class _Search:
    """The beams of one prompt."""

    def __init__(self, options: SampleConfig, vocab_size: int, stop: int):
        beams = options.num_beams
        self._beams, self._vocab_size, self._stop = beams, vocab_size, stop
        self._most, self._penalty = options.max_new_tokens, options.length_penalty
        self._rows: list[list[int]] = [[] for _ in range(beams)]
        self.scores = np.full(beams, IMPOSSIBLE)
        """Sums of log-probabilities. All beams start as the prompt, so only the first one may be continued."""
        self.scores[0] = 0
        self._ended: list[tuple[np.float32, list[int], bool]] = [(IMPOSSIBLE, [], False)] * beams
        self.improvable = True
        """Whether a continuation can still beat the finished ones."""

    def advance(self, sums_N: np.ndarray, places_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adds one token: given the best candidates of all beams, best first, returns each new beam's parent and token.

        `places_N` are `beam * vocab_size + token`.
        """
        parents_N, tokens_N = places_N // self._vocab_size, places_N % self._vocab_size
        length = len(self._rows[0]) + 1
        ends_N = (tokens_N == self._stop) | (length == self._most)
        ended = list(self._ended)
        for score, parent, token, ends in zip(
            sums_N[: self._beams], parents_N, tokens_N, ends_N[: self._beams], strict=False
        ):
            if ends and self.improvable:
                row = [*self._rows[parent], int(token)]
                ended.append((score / np.float32(length**self._penalty), row, True))
        self._ended = sorted(ended, key=lambda item: -item[0])[: self._beams]
        going_on = np.argsort(-np.where(ends_N, sums_N + IMPOSSIBLE, sums_N), kind="stable")[: self._beams]
        self._rows = [[*self._rows[parents_N[n]], int(tokens_N[n])] for n in going_on]
        self.scores = np.where(ends_N, sums_N + IMPOSSIBLE, sums_N)[going_on]
        worst = min(score for score, _, _ in self._ended) if all(done for _, _, done in self._ended) else IMPOSSIBLE
        self.improvable &= bool(self.scores[0] / np.float32(length**self._penalty) > worst)
        return parents_N[going_on], tokens_N[going_on].astype(np.int32)

    def best(self, count: int) -> list[np.ndarray]:
        """The best finished continuations."""
        rows = [row for _, row, _ in self._ended[:count]]
        return [np.array(row[:-1] if row and row[-1] == self._stop else row, np.int32) for row in rows]


@functools.partial(jax.jit, static_argnames=("config", "dtype", "rule", "beams"), donate_argnames="cache")
def _best(
    config: ModelConfig,
    dtype: str,
    rule: Rule,
    beams: int,
    weights: DecodingWeights,
    cache: Cache,
    history: History,
    last_B: jax.Array,
    scores_B: jax.Array,
    number: jax.Array,
    stop_B: jax.Array,
    numbers: Numbers,
    tables: Tables,
) -> tuple[Cache, jax.Array, jax.Array]:
    """The best `2 * beams` one-token continuations of each prompt: sums, and `beam * V + token`, both `[P, N]`.

    There are twice as many as beams, so that `beams` continuations remain even if that many end.
    """
    logits_BV, cache = next_logits(config, dtype, weights, last_B, cache)
    log_p_BV = control(jax.nn.log_softmax(logits_BV), rule, numbers, tables, history, number, stop_B)
    sums = (log_p_BV + scores_B[:, None]).reshape(-1, beams * logits_BV.shape[1])
    return cache, *jax.lax.top_k(sums, min(2 * beams, sums.shape[1]))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _follow(cache: Cache, history: History, parents_B: jax.Array, last_B: jax.Array) -> tuple[Cache, History]:
    """Cache and history of the new beams: copies of their parents', with one more token."""
    history = jax.tree.map(lambda leaf: leaf[parents_B], history)
    return select_rows(cache, parents_B), remember(history, last_B)
