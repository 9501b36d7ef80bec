"""Beam search: finds continuations of high total log-probability.

Diverse beam search (arXiv:1610.02424) divides the beams into groups. In each step the groups choose one after another,
and the score of a token falls by `diversity_penalty` for each beam of earlier groups that chose it.

Shape suffixes: P prompt, G group, K beam of a group, B beam (of all prompts), N candidates of a group, V
vocabulary.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.controls import Controls, History, control, make_history, remember
from gptjax.generation.decode import DecodingModel, next_logits, prefilled, prepare, window_slots
from gptjax.generation.request import Request, check_prompts, check_room
from gptjax.model.cache import Cache, select_rows

IMPOSSIBLE = np.float32(-1e9)
"""Score of a candidate that must not be chosen."""


def beam_search(config: ModelConfig, params: dict, request: Request, *, prefix: bool = False) -> list[list[np.ndarray]]:
    """Returns the `options.num_samples` best continuations of each prompt, best first, without end-of-text.

    Each step keeps the `num_beams` continuations with the highest sums of log-probabilities. A continuation that ends
    is stored with its score: the sum divided by its length to the power `length_penalty`. The search ends at
    `max_new_tokens`, or when no continuation of the current length would beat the worst of `num_beams` stored ones.
    Each group of `beam_groups` is such a search; the sums of its beams include the penalties for tokens of others.

    Arguments are those of `decode.stream`.

    Raises:
        UserError: As `decode.stream`, or a prompt and its new tokens do not fit in the context.
    """
    prompts, options = request.prompts, request.options
    check_prompts(config, prompts, options)
    check_room(config, prompts, options, "num_beams")
    beams, groups = options.num_beams, options.beam_groups
    searches = [_Search(options, config.vocab_size, request.stop) for _ in range(len(prompts) * groups)]
    contexts = [np.asarray(prompt, np.int32) for prompt in prompts]
    model = prepare(config, params, options, len(prompts) * beams, prefix)
    slots = window_slots(model.config, contexts, options.max_new_tokens)
    cache = select_rows(prefilled(model, contexts, slots), np.repeat(np.arange(len(prompts)), beams))
    rows = [context for context in contexts for _ in range(beams)]
    controls, last_B = request.controls(config.vocab_size, len(rows)), np.array([row[-1] for row in rows], np.int32)
    history = make_history(controls.rule, rows, options.max_new_tokens, config.vocab_size)
    for number in range(options.max_new_tokens):
        scores_B = np.concatenate([search.scores for search in searches])
        cache, *best = _best(
            *(model, controls, beams, groups, cache, history, last_B, scores_B),
            *(np.int32(number), np.float32(options.diversity_penalty)),
        )
        candidates = (np.asarray(part).reshape(len(searches), -1) for part in best)
        chosen = [search.advance(*mine) for search, *mine in zip(searches, *candidates, strict=True)]
        if not any(search.improvable for search in searches):
            break
        parents_B = np.concatenate([parents + first * beams // groups for first, (parents, _) in enumerate(chosen)])
        last_B = np.concatenate([tokens for _, tokens in chosen])
        cache, history = _follow(cache, history, parents_B, last_B)
    parts = (searches[first : first + groups] for first in range(0, len(searches), groups))
    return [_best_of(part, options.num_samples) for part in parts]


class _Search:
    """The beams of one group of a prompt."""

    def __init__(self, options: SampleConfig, vocab_size: int, stop: int):
        beams = options.num_beams // options.beam_groups
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

    @property
    def ended(self) -> list[tuple[np.float32, np.ndarray]]:
        """Scores and tokens of the best finished continuations."""
        found = [(score, row[:-1] if row and row[-1] == self._stop else row) for score, row, _ in self._ended]
        return [(score, np.array(row, np.int32)) for score, row in found]


def _best_of(groups: Sequence[_Search], count: int) -> list[np.ndarray]:
    """The best continuations of a prompt's groups, best first."""
    found = sorted((one for group in groups for one in group.ended), key=lambda one: -one[0])
    return [row for _, row in found[:count]]


@functools.partial(jax.jit, static_argnames=("beams", "groups"), donate_argnames="cache")
def _best(
    model: DecodingModel,
    controls: Controls,
    beams: int,
    groups: int,
    cache: Cache,
    history: History,
    last_B: jax.Array,
    scores_B: jax.Array,
    number: jax.Array,
    penalty: jax.Array,
) -> tuple[Cache, jax.Array, jax.Array]:
    """The best one-token continuations of each group: sums, and `beam * V + token` with its number of the beam, both
    `[P, G, N]`.

    There are twice as many as beams, so that enough remain even if each beam ends.
    """
    logits_BV, cache = next_logits(model, last_B, cache)
    log_p_BV = control(jax.nn.log_softmax(logits_BV), controls, history, number)
    (B, V), size = logits_BV.shape, beams // groups
    sums_PGKV = (log_p_BV + scores_B[:, None]).reshape(B // beams, groups, size, V)
    penalties_PV, found = jnp.zeros((B // beams, V)), []
    for group in range(groups):
        sums = (sums_PGKV[:, group] - penalties_PV[:, None]).reshape(-1, size * V)
        found.append(jax.lax.top_k(sums, min(2 * size, size * V)))
        tokens_PN = found[-1][1] % V
        going_on_PN = jnp.argsort(tokens_PN == controls.stop_B[::beams, None], axis=1, stable=True)[:, :size]
        chosen = jax.nn.one_hot(jnp.take_along_axis(tokens_PN, going_on_PN, axis=1), V)
        penalties_PV += penalty * jnp.sum(chosen, axis=1)
    sums_PGN, places_PGN = (jnp.stack(part, axis=1) for part in zip(*found, strict=True))
    return cache, sums_PGN, places_PGN


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _follow(cache: Cache, history: History, parents_B: jax.Array, last_B: jax.Array) -> tuple[Cache, History]:
    """Cache and history of the new beams: copies of their parents', with one more token."""
    history = jax.tree.map(lambda leaf: leaf[parents_B], history)
    return select_rows(cache, parents_B), remember(history, last_B)
