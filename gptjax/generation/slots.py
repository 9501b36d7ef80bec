"""Continuous batching: sequences start and end at any time and share one compiled loop, each in a slot of the cache.

Prompts are prefilled in chunks between decoding steps, so a long prompt delays other sequences by one chunk at a time.
When a sequence ends, its slot keeps the tokens; a later prompt with the same prefix prefills only the rest (prefix
caching). A prompt must fit in `block_size`. With position methods that depend only on distances, new tokens then
replace the oldest ones, as in `decode`; with others, a prompt and its new tokens must fit.

Shape suffixes: B slot, P prompt of a chunk, T position, V vocabulary, K most likely tokens.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.decoding import token_biases
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.choose import Numbers, Rule, choice_numbers, log_probabilities
from gptjax.generation.constraint import Constraint
from gptjax.generation.controls import Controls, History, Tables, make_history, make_tables
from gptjax.generation.decode import (
    NOTHING,
    PREFILL,
    DecodingModel,
    Logprobs,
    Piece,
    decode,
    extended_logits,
    slides_by_token,
    split_rows,
)
from gptjax.generation.request import check_prompts, row_key
from gptjax.model.cache import Cache, copy_tokens, init_cache, replace_rows, select_rows

CHUNKS = ((1, 32), (4, 32), (1, PREFILL))
"""Number of prompts and tokens of each in one prefill: of one or several short prompts, or of a long one."""
BURST_SECONDS, LONGEST_BURST = 0.1, 16
"""Time of the decoding steps that run before new requests are accepted, and their largest number; only one step while
prompts wait."""
WORTH_COPYING = 64
"""A common prefix of at least this many tokens is copied from another slot."""
SLOTS_MULTIPLE = 64
MOST_LOGPROBS = 20
"""Number of most likely tokens that are returned with log-probabilities."""


@dataclasses.dataclass(eq=False)
class Row:
    """One sequence in a slot."""

    prompt: np.ndarray
    """Token ids, int32, at least one."""
    options: SampleConfig
    """Choice and number of new tokens; `check_options` says which options are supported."""
    end_of_text: int | None = None
    number: tuple[int, int] = (0, 0)
    """Numbers of the prompt and of the sample, which select the random key as in `decode.stream`."""
    score_prompt: bool = False
    """Also return log-probabilities of the prompt's tokens."""
    score_only: bool = False
    """End after the prefill of the prompt."""
    constraint: Constraint | None = None
    """The form that the new tokens must have."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    """Prompt and new tokens."""
    slot: int = -1
    read: int = 0
    """Number of tokens in the cache."""

    def __post_init__(self):
        self.tokens = self.prompt.tolist()

    @property
    def new(self) -> int:
        """Number of new tokens so far."""
        return len(self.tokens) - len(self.prompt)


class Event(NamedTuple):
    """The result of a step for one sequence."""

    row: Row
    piece: Piece
    """New tokens."""
    ended: bool
    prompt_logprobs: Logprobs | None = None
    """Log-probabilities of a part of the prompt (without its first token), if the row asks for them."""


class _Burst(NamedTuple):
    """Decoding steps that the device computes."""

    rows: list[Row]
    limit: int
    """Number of steps."""
    begin: float
    """Time at which it started."""
    new_BN: jax.Array
    logprobs: Logprobs | None


def check_options(options: SampleConfig) -> None:
    """Checks that slots support the options.

    Raises:
        UserError: An option is not supported; the message names it.
    """
    for name, off in (("no_repeat_ngram", 0), ("bad_words", ()), ("num_beams", 1), ("contrastive_alpha", 0)):
        if getattr(options, name) != off:
            raise UserError(
                f"{name}={getattr(options, name)!r} is supported by gptjax sample only; leave it at {off!r}"
            )
    if options.logprobs > MOST_LOGPROBS:
        raise UserError(f"logprobs={options.logprobs} must be at most {MOST_LOGPROBS}")


def fits(config: ModelConfig, prompt: int, new: int) -> bool:
    """Whether so many new tokens can follow a prompt of so many tokens."""
    return (slides_by_token(config) and not config.attention_sinks) or prompt + new <= config.block_size + 1


class SlotDecoder:
    """Decodes up to `slots` sequences together. Not thread-safe."""

    def __init__(self, model: DecodingModel, slots: int):
        config = model.config
        self._model, self._slots, self.prompt_tokens_read = model, slots, 0
        self._size = size = (
            -(-(config.block_size + PREFILL) // SLOTS_MULTIPLE) * SLOTS_MULTIPLE
        )  # a last chunk may be padded
        self._cache = init_cache(config, jnp.zeros(slots, jnp.int32), size, model.stored, own_lengths=True)
        self._keys_B = jax.random.split(jax.random.key(0), slots)
        self._numbers = choice_numbers(SampleConfig(), slots)
        self._history, self._tables = History(), Tables()
        self._rows: list[Row | None] = [None] * slots
        self._kept: list[list[int]] = [[] for _ in range(slots)]  # tokens in the cache of a free slot
        self._freed = [0] * slots  # when the slot became free: smaller is longer ago
        self._clock, self._step_seconds = 0, BURST_SECONDS
        self._fresh: set[Row] = set()  # rows whose prefix was not yet searched for in other slots

    @property
    def free(self) -> int:
        """Number of slots without a sequence."""
        return sum(row is None for row in self._rows)

    @property
    def rows(self) -> list[Row]:
        """Sequences in slots."""
        return [row for row in self._rows if row is not None]

    def start(self, row: Row) -> None:
        """Puts a sequence into the free slot that has the longest common prefix with it.

        Raises:
            UserError: The prompt is empty, has ids outside the vocabulary or does not fit with the new tokens, or an
                option is not supported.
        """
        config, options = self._model.config, row.options
        check_prompts(config, [row.prompt], options)
        check_options(options)
        new = 0 if row.score_only else options.max_new_tokens
        if len(row.prompt) > config.block_size or not fits(config, len(row.prompt), new):
            raise UserError(
                f"the prompt has {len(row.prompt):,} tokens, and {new:,} new ones do not fit in"
                f" model.block_size={config.block_size}"
            )
        free = [slot for slot, other in enumerate(self._rows) if other is None]
        row.slot = max(free, key=lambda slot: (_common(self._kept[slot], row.prompt), -self._freed[slot]))
        self._rows[row.slot] = row
        self._fresh.add(row)
        self._keys_B, self._numbers = _set_choice(
            *(self._keys_B, self._numbers, row.slot),
            *(np.uint32(options.seed), *row.number, choice_numbers(options, 1)),
        )
        if _is_controlled(row) or self._history.counts_BV is not None:  # replaces the tables of an earlier row
            self._set_controls(row)

    def stop(self, row: Row) -> None:
        """Frees a sequence's slot; its tokens stay in the cache until another sequence needs the slot."""
        if row.slot >= 0 and self._rows[row.slot] is row:
            self._kept[row.slot] = self._held(row)
            self._clock += 1
            self._freed[row.slot] = self._clock
            self._rows[row.slot] = None
            self._fresh.discard(row)

    def _held(self, row: Row) -> list[int]:
        """The tokens in a row's slot that a prompt with the same prefix can reuse: none once the first are replaced.

        Steps of a burst after the end of a sequence also write.
        """
        return row.tokens[: row.read] if row.read + LONGEST_BURST <= self._size else []

    def step(self, while_computing: Callable[[], None] = lambda: None) -> list[Event]:
        """Prefills one chunk of waiting prompts, if there are any, and adds tokens to the other sequences.

        Stops sequences that end. `while_computing` is called once, when the device has its work; it may stop sequences.
        """
        waiting = [row for row in self.rows if row.read < len(row.prompt) - 1 or row in self._fresh]
        events = self._read(waiting) if waiting else []
        ready = [row for row in self.rows if row.read >= len(row.prompt) - 1 and row not in self._fresh]
        ended = {row for row in ready if row.score_only or not self._constrain(row)}
        events += [Event(row, _NO_TOKENS, True) for row in ready if row in ended]
        burst = self._launch([row for row in ready if row not in ended]) if len(ready) > len(ended) else None
        while_computing()
        if burst is not None:
            events += self._collect(burst)
        for event in events:
            if event.ended:
                self.stop(event.row)
        return events

    def _read(self, waiting: list[Row]) -> list[Event]:
        first = self._begin(waiting)
        if not first:
            return []
        P, T = chunk_shape(len(first), len(first[0].prompt) - 1 - first[0].read)
        chosen = first[:P]
        slots_P, used_P = np.zeros((2, P), np.int32)
        tokens_PT, next_PT = np.zeros((2, P, T), np.int32)
        for n, row in enumerate((chosen * P)[:P]):  # the rest are copies, which write the same again
            end = min(row.read + T, len(row.prompt) - 1)
            slots_P[n], used_P[n] = row.slot, row.read
            tokens_PT[n, : end - row.read] = row.prompt[row.read : end]
            next_PT[n, : end - row.read] = row.prompt[row.read + 1 : end + 1]
        K = min(MOST_LOGPROBS, self._model.config.vocab_size) if any(row.score_prompt for row in chosen) else 0
        self._cache, logprobs = _read_chunk(self._model, K, self._cache, slots_P, tokens_PT, used_P, next_PT)
        logprobs = jax.device_get(logprobs)
        events = []
        for n, row in enumerate(chosen):
            count = min(T, len(row.prompt) - 1 - row.read)
            row.read += count
            self.prompt_tokens_read += count
            if row.score_prompt:
                mine = Logprobs(*(part[n, :count, ...] for part in logprobs))
                events.append(Event(row, _NO_TOKENS, False, mine))
        return events

    def _begin(self, waiting: list[Row]) -> list[Row]:
        """Rows to prefill, oldest first. A row that can copy its prefix from one that is being prefilled waits for
        it.
        """
        ready: list[Row] = []
        for row in waiting:
            if row in self._fresh:
                others = (other for other in ready if not row.score_prompt)
                if any(_common(other.tokens, row.prompt) >= WORTH_COPYING + other.read for other in others):
                    continue
                self._fresh.discard(row)
                self._reuse(row)
            if row.read < len(row.prompt) - 1:
                ready.append(row)
        return ready

    def _reuse(self, row: Row) -> None:
        """Reuses the cached prefix of a prompt from the row's slot or from another one."""
        if row.score_prompt:
            return
        lengths = [
            _common(kept if other is None or other is row else self._held(other), row.prompt)
            for kept, other in zip(self._kept, self._rows, strict=True)
        ]
        best = int(np.argmax(lengths))
        if lengths[best] >= lengths[row.slot] + WORTH_COPYING:
            self._cache = _copy_slot(self._cache, np.int32(best), np.int32(row.slot))
            row.read = lengths[best]
        else:
            row.read = lengths[row.slot]
        row.read = min(row.read, len(row.prompt) - 1)

    def _launch(self, decoded: list[Row]) -> _Burst:
        """Starts the next decoding steps of sequences."""
        left = [row.options.max_new_tokens - row.new for row in decoded]
        # Others wait for their prefill, or each token changes what the constraint allows next.
        single = len(decoded) < len(self.rows) or any(row.constraint is not None for row in decoded)
        limit = 1 if single else burst_length(self._step_seconds, left)
        done_B, last_B, count_B = np.ones(self._slots, bool), *np.zeros((2, self._slots), np.int32)
        stop_B, used_B = np.full(self._slots, NOTHING, np.int32), np.zeros(self._slots, np.int32)
        for slot, row in enumerate(self._rows):
            used_B[slot] = len(self._kept[slot]) if row is None else row.read
        for row in decoded:
            done_B[row.slot], last_B[row.slot], count_B[row.slot] = False, row.tokens[-1], row.new
            if row.end_of_text is not None and not row.options.ignore_end_of_text:
                stop_B[row.slot] = row.end_of_text
        rule = self._rule(decoded)
        history, tables = (self._history, self._tables) if rule.penalties else (History(), Tables())
        controls, cache = Controls(rule, self._numbers, tables, stop_B), self._cache._replace(used=jnp.asarray(used_B))
        begin = time.monotonic()
        self._cache, history, new_BN, logprobs = decode(
            self._model, controls, cache, history, last_B, done_B, self._keys_B, count_B, np.int32(limit)
        )
        if rule.penalties:
            self._history = history
        return _Burst(decoded, limit, begin, new_BN, logprobs)

    def _collect(self, burst: _Burst) -> list[Event]:
        """Waits for the new tokens and adds them to their sequences."""
        limit, events = burst.limit, []
        pieces = split_rows(np.asarray(burst.new_BN)[:, :limit], jax.device_get(burst.logprobs))
        steps = min(limit, 1 + max(len(pieces[row.slot].tokens_N) for row in burst.rows))  # it ends with the last one
        self._step_seconds = (time.monotonic() - burst.begin) / steps
        for row in burst.rows:
            if self._rows[row.slot] is not row:  # it was stopped while the device computed
                continue
            piece = pieces[row.slot]
            ended = len(piece.tokens_N) < limit
            left = row.options.max_new_tokens - row.new
            mine = None
            if piece.logprobs is not None and row.options.logprobs:
                chosen_N, ids_NK, top_NK = piece.logprobs
                K = row.options.logprobs
                mine = Logprobs(chosen_N[:left], ids_NK[:left, :K], top_NK[:left, :K])
            piece = Piece(piece.tokens_N[:left], mine)
            row.tokens += piece.tokens_N.tolist()
            row.read = len(row.tokens) - 1
            if row.constraint is not None:
                row.constraint.add(piece.tokens_N.tolist())
            events.append(Event(row, piece, ended or row.new == row.options.max_new_tokens))
        return events

    def _rule(self, rows: list[Row]) -> Rule:
        """One of few rules, so that few programs compile: if one filter or control is needed, all are on."""
        options = [row.options for row in rows]
        filters = any(o.temperature > 0 and (o.top_k or o.top_p < 1 or o.min_p or o.typical_p < 1) for o in options)
        controls = any(map(_is_controlled, rows))
        return Rule(
            greedy=False,
            mixed=True,
            **dict.fromkeys(("nucleus", "min_p", "typical", "row_top_k"), filters),
            **dict.fromkeys(("bias", "penalties", "min_new"), controls),
            logprobs=min(MOST_LOGPROBS, self._model.config.vocab_size) if any(o.logprobs for o in options) else 0,
        )

    def _constrain(self, row: Row) -> bool:
        """Bans all tokens that a row's constraint does not allow next; returns whether any token is allowed."""
        if row.constraint is None:
            return True
        [bias_V] = np.asarray(make_tables(BIAS, token_biases(row.options), (), self._model.config.vocab_size).bias_BV)
        biases_V = row.constraint.biases(bias_V)
        if biases_V is not None:
            self._tables = _set_row(self._tables, row.slot, Tables(jnp.asarray(biases_V)[None]))
        return biases_V is not None

    def _set_controls(self, row: Row) -> None:
        B, V = self._slots, self._model.config.vocab_size
        if self._history.counts_BV is None:
            self._history = History(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32))
            self._tables = Tables(jnp.zeros((B, V)))
        rule = BIAS._replace(penalties=True)
        new_rows = (
            make_history(rule, [row.prompt], row.options.max_new_tokens, V),
            make_tables(rule, token_biases(row.options), (), V),
        )
        self._history, self._tables = _set_row((self._history, self._tables), row.slot, new_rows)


def burst_length(step_seconds: float, left: list[int]) -> int:
    """Number of decoding steps before new requests are accepted.

    Args:
        step_seconds: Time of a step.
        left: Number of tokens that each sequence may still get. The burst ends with the first sequence that ends in its
            second half, because steps after that would do nothing for it.
    """
    longest = max(1, min(LONGEST_BURST, int(BURST_SECONDS / step_seconds)))
    return min(longest, min((n for n in left if 2 * n >= longest), default=max(left)))


def chunk_shape(prompts: int, tokens: int) -> tuple[int, int]:
    """Number of prompts and tokens of each in the next prefill.

    Args:
        prompts: Number of prompts that wait.
        tokens: Number of tokens of the first one that are not read yet.
    """
    shapes = [shape for shape in CHUNKS if shape[1] >= tokens] or [CHUNKS[-1]]
    return next((shape for shape in shapes if shape[0] >= prompts), max(shapes))


BIAS = Rule(greedy=False, bias=True)
_NO_TOKENS = Piece(np.zeros(0, np.int32), None)


@functools.partial(jax.jit, static_argnames="K", donate_argnames="cache")
def _read_chunk(
    model: DecodingModel,
    K: int,
    cache: Cache,
    slots_P: jax.Array,
    tokens_PT: jax.Array,
    used_P: jax.Array,
    next_PT: jax.Array,
) -> tuple[Cache, Logprobs | None]:
    """Prefills one chunk of prompts in their slots. Several may be the same one.

    Args:
        model: The model.
        K: Number of most likely tokens to return at each position, with log-probabilities of `next_PT`; 0: none.
        cache: Cache of all slots.
        slots_P: Slot of each prompt.
        tokens_PT: The next tokens of each prompt, padded at the end. Later tokens overwrite the padding.
        used_P: Number of tokens before them.
        next_PT: The token after each one.
    """
    P, T = tokens_PT.shape
    part = select_rows(cache, slots_P)._replace(used=used_P)
    logits_PTV, part = extended_logits(model, tokens_PT, part)
    cache = copy_tokens(cache, part, slots_P, used_P, T, model.config.attention_sinks)
    if not K:
        return cache, None
    found = log_probabilities(logits_PTV.reshape(P * T, -1), next_PT.reshape(-1), K)
    return cache, Logprobs(*(part.reshape(P, T, *part.shape[1:]) for part in found))


@functools.partial(jax.jit, donate_argnums=0)
def _copy_slot(cache: Cache, source: jax.Array, target: jax.Array) -> Cache:
    """Copies the keys and values of one slot to another."""
    return replace_rows(cache, target[None], select_rows(cache, source[None]))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _set_choice(
    keys_B: jax.Array,
    numbers: Numbers,
    row: jax.Array | int,
    seed: jax.Array,
    prompt: jax.Array | int,
    sample: jax.Array | int,
    new: Numbers,
) -> tuple[jax.Array, Numbers]:
    """Sets the random key and the sampling parameters of a row."""
    numbers = jax.tree.map(lambda old, new: old.at[row].set(new[0]), numbers, new)
    return keys_B.at[row].set(row_key(seed, prompt, sample)), numbers


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(arrays: Any, row: jax.Array | int, new: Any) -> Any:
    """Replaces one row of arrays by the single row of `new`."""
    return jax.tree.map(lambda old, new: old.at[row].set(new[0]), arrays, new)


def _is_controlled(row: Row) -> bool:
    options = row.options
    penalties = (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) != (1, 0, 0)
    others = bool(options.logit_bias) or options.min_new_tokens > 0 or row.constraint is not None
    return penalties or others


def _common(kept: list[int], prompt: np.ndarray) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(kept), len(prompt))
    differs = np.flatnonzero(np.asarray(kept[:length], np.int32) != prompt[:length])
    return int(differs[0]) if len(differs) else length
