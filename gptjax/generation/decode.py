"""Continues token sequences with a KV cache.

The context of a sequence is the part that the model reads: first the last `block_size` tokens of the prompt. When a
context would become longer than `block_size`, it slides:

- With position methods that depend only on distances (RoPE, ALiBi, relative biases, none), each new token replaces the
  oldest one in the cache. So each token attends to the last `block_size` tokens, as in sliding-window attention.
- With other methods, the newest `block_size // 2` tokens (at least one) are kept and prefilled again. This costs one
  prefill for every `block_size // 2` new tokens.

With `attention_sinks`, the first tokens stay in both cases, instead of some of the newest (arXiv:2309.17453).

Shape suffixes: B sequence (one sample of one prompt), T position, N new token, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.choose import choose, log_probabilities
from gptjax.generation.controls import Controls, History, control, make_history, remember
from gptjax.generation.request import Request, check_prompts
from gptjax.generation.weights import DecodingWeights, decoding_weights
from gptjax.machine.platform import target_platform
from gptjax.model.cache import Cache, grow_cache, init_cache
from gptjax.model.gpt import extend, finish_logits, for_decoding
from gptjax.model.positions import POSITIONS
from gptjax.ops import kernels
from gptjax.ops.projection import project

BUFFER = 64  # most new tokens that one call of the compiled loop returns
PREFILL = 128  # longer prompts are prefilled in chunks of this length
SLOTS_MULTIPLE = 64
LARGE = 2**25  # a cache of more bytes grows as it fills: reading less memory then saves more than compiling costs
NOTHING = -1  # in the buffer: no token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingModel:
    """A model with weights in their layout for decoding."""

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    weights: DecodingWeights
    dtype: str = dataclasses.field(metadata={"static": True})
    """Dtype of activations."""
    stored: str = dataclasses.field(metadata={"static": True})
    """Dtype of the cache."""
    prefix: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether the tokens of a context also attend to later ones, as in a prefix LM."""


class Logprobs(NamedTuple):
    """Log-probabilities of new tokens from the model's logits, before controls and temperature."""

    chosen_N: np.ndarray | jax.Array
    """Log-probabilities of the chosen tokens."""
    ids_NK: np.ndarray | jax.Array
    """The most likely tokens at each position, the most likely first."""
    top_NK: np.ndarray | jax.Array
    """Their log-probabilities."""


class Piece(NamedTuple):
    """New tokens of one sequence."""

    tokens_N: np.ndarray
    """Token ids, int32."""
    logprobs: Logprobs | None
    """None unless `options.logprobs` asks for them."""


def generate(
    config: ModelConfig, params: dict, prompts: Sequence[np.ndarray], options: SampleConfig, **others: Any
) -> list[list[np.ndarray]]:
    """Returns the new token ids of every sample, `[prompt][sample]`, without prompt and end-of-text.

    `others` are other fields of a `Request`. Errors are those of `stream`.
    """
    request = Request(prompts, options, **others)
    rows: list[list[np.ndarray]] = [[] for _ in range(request.rows)]
    for pieces in stream(config, params, request, piece_length=BUFFER):
        for row, piece in zip(rows, pieces, strict=True):
            row.append(piece.tokens_N)
    samples = [np.concatenate([np.zeros(0, np.int32), *row]) for row in rows]
    return [samples[i : i + options.num_samples] for i in range(0, len(samples), options.num_samples)]


def stream(
    config: ModelConfig, params: dict, request: Request, *, piece_length: int = 8, prefix: bool = False
) -> Iterator[list[Piece]]:
    """Yields new tokens as they are generated: a list with one `Piece` per sequence (prompt by prompt, sample by
    sample).

    The tokens of a sequence depend on its prompt, the seed, the prompt's number and the sample's number. They do not
    depend on other sequences.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        request: Prompts and how they are continued.
        piece_length: New tokens per sequence in one piece, at most 64.
        prefix: See `DecodingModel`.

    Raises:
        UserError: A prompt is empty or holds an id outside the vocabulary, or an option names such an id.
    """
    check_prompts(config, request.prompts, request.options)
    return _stream(config, params, request, min(piece_length, BUFFER), prefix)


def prepare(config: ModelConfig, params: dict, options: SampleConfig, rows: int, prefix: bool = False) -> DecodingModel:
    """Converts a model to its layout for decoding `rows` sequences at once, in the precision of the options."""
    config, params = for_decoding(config, params)
    if options.attention_sinks:
        config = dataclasses.replace(config, attention_sinks=options.attention_sinks)
    weight_dtype = options.compute_dtype if options.quantize == "none" else options.quantize
    dtype = "float32" if target_platform() == "cpu" else options.compute_dtype
    stored = options.compute_dtype if kernels.usable_for_a_cache(options.compute_dtype, config.head_width) else dtype
    return DecodingModel(config, decoding_weights(config, params, weight_dtype, rows == 1), dtype, stored, prefix)


def _stream(config: ModelConfig, params: dict, request: Request, piece_length: int, prefix: bool):
    options, constraints, notify, rows = request.options, request.constraints, request.notify, request.rows
    model = prepare(config, params, options, rows, prefix)
    config = model.config
    contexts = [context for context in _cut(config, request.prompts, notify) for _ in range(options.num_samples)]
    keys_B, controls = request.keys(), request.controls(config.vocab_size, rows)
    biases_BV = np.repeat(np.asarray(controls.tables.bias_BV), rows, axis=0) if constraints else None
    history = make_history(controls.rule, contexts, options.max_new_tokens, config.vocab_size)
    done_B = np.zeros(rows, bool)
    slides = slides_by_token(config)
    cache, number, used, slots, most, told = None, 0, 0, 0, 0, False
    while number < options.max_new_tokens and not done_B.all():
        room = min(config.block_size + 1 - len(c) for c, done in zip(contexts, done_B, strict=True) if not done)
        if room < 1 and not told:
            how = "by a token at a time" if slides else f"to its last {_kept(config) - config.attention_sinks} tokens"
            how += f"; its first {config.attention_sinks} stay" if config.attention_sinks else ""
            notify(f"the context is full (model.block_size={config.block_size}): it slides {how}")
            told = True
        # Slots were counted for the longest context. After it ends, the others may need more, and are prefilled again.
        if cache is None or (not slides and (room < 1 or used == most)):
            contexts = [_window(config, c, done) for c, done in zip(contexts, done_B, strict=True)]
            used = prefill_length(contexts)
            new = options.max_new_tokens - number
            most = max(most, sliding_slots(config, used, new) if slides else window_slots(config, contexts, new))
            slots = max(slots, _first_slots(config, model.stored, len(contexts), used, most))
            cache = prefilled(model, contexts, slots)
            continue
        if used == slots < most:
            slots = min(2 * slots, most)
            cache = _grown(config, cache, slots, PREFILL)
        limit = min(piece_length, options.max_new_tokens - number)
        if slots < most or not slides:
            limit = min(limit, slots - used)
        if room >= 1:  # stop when a context becomes full, to report it
            limit = min(limit, room)
        if biases_BV is not None:
            limit = 1  # the next token decides what may follow
            allowed = [None if done else c.biases(b) for c, b, done in zip(constraints, biases_BV, done_B, strict=True)]
            done_B = np.array([row is None for row in allowed])
            if done_B.all():
                return
            stacked_BV = [b if row is None else row for row, b in zip(allowed, biases_BV, strict=True)]
            tables = controls.tables._replace(bias_BV=jnp.asarray(np.stack(stacked_BV)))
            controls = dataclasses.replace(controls, tables=tables)
        last_B = np.array([c[-1] for c in contexts], np.int32)
        places = np.full(rows, number, np.int32), np.int32(limit)
        cache, history, new_BN, logprobs = decode(model, controls, cache, history, last_B, done_B, keys_B, *places)
        new_BN = np.asarray(new_BN)[:, :limit]
        pieces = split_rows(new_BN, jax.device_get(logprobs))
        contexts = [np.concatenate([c, piece.tokens_N]) for c, piece in zip(contexts, pieces, strict=True)]
        for constraint, piece in zip(constraints, pieces, strict=False):
            constraint.add(piece.tokens_N.tolist())
        done_B = new_BN[:, -1] == NOTHING
        number += limit
        used += limit
        yield pieces
        done_B |= [request.is_finished(row) for row in range(rows)]


def slides_by_token(config: ModelConfig) -> bool:
    """Whether a new token may replace the oldest one of a full context in the cache; see the module."""
    return POSITIONS[config.positions].slides and config.adapter.kind not in ("prompt", "prefix")


def split_rows(new_BN: np.ndarray, logprobs: Logprobs | None) -> list[Piece]:
    """Splits the output of `decode`, on the host, into the new tokens of each sequence."""
    pieces = []
    for row, tokens_N in enumerate(new_BN):
        count = int(np.sum(tokens_N != NOTHING))
        mine = None if logprobs is None else Logprobs(*(part[row, :count] for part in logprobs))
        pieces.append(Piece(tokens_N[:count], mine))
    return pieces


@functools.partial(jax.jit, donate_argnames=("cache", "history"))
def decode(
    model: DecodingModel,
    controls: Controls,
    cache: Cache,
    history: History,
    last_B: jax.Array,
    done_B: jax.Array,
    keys_B: jax.Array,
    count_B: jax.Array,
    limit: jax.Array,
) -> tuple[Cache, History, jax.Array, Logprobs | None]:
    """Adds up to `limit` tokens to every unfinished sequence.

    `last_B` are the newest tokens, which are not in the cache yet. `count_B` is the number of new tokens before them.

    Returns:
        The extended cache and history; the new tokens, `[B, BUFFER]`; and their log-probabilities, `[B, BUFFER]`.
    """
    B, rule, K = last_B.shape[0], controls.rule, controls.rule.logprobs

    def step(carry):
        n, cache, history, last_B, done_B, new_BN, logprobs = carry
        used = cache.used
        logits_BV, cache = next_logits(model, last_B, cache)
        if used.ndim:  # finished sequences keep their length, so that their slot can be continued later
            cache = cache._replace(used=jnp.where(done_B, used, cache.used))
        token_keys_B = keys_B if rule.greedy else jax.vmap(jax.random.fold_in)(keys_B, count_B + n)
        next_B = choose(control(logits_BV, controls, history, count_B + n), token_keys_B, rule, controls.numbers)
        if logprobs is not None:
            found = log_probabilities(logits_BV, next_B, K)
            logprobs = jax.tree.map(lambda all, new: _put(all, new, n), logprobs, Logprobs(*found))
        history = remember(history, next_B, ~done_B)
        done_B = done_B | (next_B == controls.stop_B)
        new_BN = _put(new_BN, jnp.where(done_B, NOTHING, next_B), n)
        return n + 1, cache, history, jnp.where(done_B, last_B, next_B), done_B, new_BN, logprobs

    def unfinished(carry):
        n, _, _, _, done_B, _, _ = carry
        return (n < limit) & ~jnp.all(done_B)

    new_BN = jnp.full((B, BUFFER), NOTHING, jnp.int32)
    logprobs = None
    if K:
        floats, ids = jnp.zeros((B, BUFFER, K)), jnp.zeros((B, BUFFER, K), jnp.int32)
        logprobs = Logprobs(jnp.zeros((B, BUFFER)), ids, floats)
    carry = (jnp.int32(0), cache, history, last_B, done_B, new_BN, logprobs)
    _, cache, history, _, _, new_BN, logprobs = jax.lax.while_loop(unfinished, step, carry)
    return cache, history, new_BN, logprobs


def next_logits(model: DecodingModel, last_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Puts `last_B` into the cache; returns the logits `[B, V]` of the next tokens and the cache."""
    logits_B1V, cache = extended_logits(model, last_B[:, None], cache)
    return logits_B1V[:, 0], cache


def extended_logits(model: DecodingModel, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Puts tokens into the cache; returns the logits after each of them, `[B, T, V]`, and the cache."""
    params, readout = model.weights
    x_BTD, cache = extend(model.config, params, tokens_BT, cache, model.dtype)
    return finish_logits(model.config, params, project(x_BTD, readout)), cache


def _put(all: jax.Array, new: jax.Array, n: jax.Array) -> jax.Array:
    """Writes `new`, `[B, ...]`, at index `n` of the second axis."""
    return jax.lax.dynamic_update_slice(all, new[:, None], (0, n, *(0,) * (new.ndim - 1)))


@functools.partial(jax.jit, donate_argnames="cache")
def _extend_cache(model: DecodingModel, tokens_BT: jax.Array, cache: Cache) -> Cache:
    return extend(model.config, model.weights.params, tokens_BT, cache, model.dtype, model.prefix)[1]


_grown = jax.jit(grow_cache, static_argnums=(0, 2, 3))


def prefilled(model: DecodingModel, contexts: Sequence[np.ndarray], slots: int, own_lengths: bool = False) -> Cache:
    """Returns a cache with every context except its last token, which the decoding loop runs.

    With `own_lengths`, each sequence then fills its slots separately, see `Cache`. With `model.prefix`, the last token
    also runs here, because the others attend to it; the loop runs it again.
    """
    length = prefill_length(contexts)
    padding_B = np.array([length - (len(c) - 1) for c in contexts], np.int32)
    tokens_BT = np.zeros((len(contexts), length), np.int32)
    for row, context, padding in zip(tokens_BT, contexts, padding_B, strict=True):
        row[padding:] = context[:-1]
    chunk = length + 1 if model.prefix else PREFILL
    cache = init_cache(model.config, jnp.asarray(padding_B), slots, model.stored, chunk=0 if own_lengths else chunk)
    if model.prefix and length:
        whole_BT = np.concatenate([tokens_BT, [[context[-1]] for context in contexts]], axis=1).astype(np.int32)
        cache = _extend_cache(model, whole_BT, cache)
        return cache._replace(used=cache.used - 1)
    for start in range(0, length, PREFILL):
        cache = _extend_cache(model, tokens_BT[:, start : start + PREFILL], cache)
    return cache._replace(used=jnp.full(len(contexts), cache.used)) if own_lengths else cache


def prefill_length(contexts) -> int:
    """Slots for the longest context without its last token, rounded up."""
    return padded_length(max(len(c) for c in contexts) - 1)


def padded_length(tokens: int) -> int:
    """A number of tokens rounded up so that few programs compile."""
    if tokens > PREFILL:
        return round_up(tokens, PREFILL)
    return max(16, 1 << (tokens - 1).bit_length()) if tokens else 0


def window_slots(config: ModelConfig, contexts, new: int) -> int:
    """Slots that are needed up to the last new token, or until the first context is full."""
    longest = max(len(c) for c in contexts)
    return round_up(prefill_length(contexts) + min(new, config.block_size + 1 - longest), SLOTS_MULTIPLE)


def sliding_slots(config: ModelConfig, used: int, new: int) -> int:
    """Slots that are needed up to the last new token, at most those of a full context, which then slides."""
    return round_up(min(used + new, max(used, config.block_size)), SLOTS_MULTIPLE)


def _first_slots(config: ModelConfig, dtype: str, rows: int, used: int, most: int) -> int:
    """Slots at the start, of which the prefill uses `used`: `most` for a small cache, few for a large one."""
    size = 2 * config.n_layer * config.kv_heads * config.head_width * jnp.dtype(dtype).itemsize
    return most if rows * most * size <= LARGE else round_up(used + 1, SLOTS_MULTIPLE)


def round_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


def _kept(config: ModelConfig) -> int:
    return max(1 + config.attention_sinks, config.block_size // 2)


def _window(config: ModelConfig, context: np.ndarray, done: bool) -> np.ndarray:
    """The context to prefill: all of it if it fits, else its newest half; the last token of a finished sequence."""
    if done:
        return context[-1:]
    return context if len(context) <= config.block_size else _shortened(config, context, _kept(config))


def _shortened(config: ModelConfig, context: np.ndarray, length: int) -> np.ndarray:
    """The first tokens that stay, and the newest, up to so many in total."""
    first = config.attention_sinks if len(context) > length else 0
    return np.concatenate([context[:first], context[first:][-(length - first) :]])


def _cut(config: ModelConfig, prompts, notify) -> list[np.ndarray]:
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > config.block_size:
            which = f"prompt {number}" if len(prompts) > 1 else "the prompt"
            read = f"its last {config.block_size - config.attention_sinks:,}"
            if config.attention_sinks:
                read = f"its first {config.attention_sinks:,} and {read}"
            notify(f"{which} has {len(prompt):,} tokens; the model reads {read} (model.block_size)")
    return [_shortened(config, np.asarray(prompt, np.int32), config.block_size) for prompt in prompts]
