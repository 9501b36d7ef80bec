"""Generates targets from sources with an encoder-decoder: greedy decoding or beam search.

Shape suffixes: B source, K beam, R = B times K sequences, N new token, S position of the source, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.weights import DecodingWeights, decoding_weights
from gptjax.model.cache import init_cache
from gptjax.model.gpt import encode, extend, finish_logits, layer_memories
from gptjax.model.inputs import Memory
from gptjax.ops.projection import project
from gptjax.text.tokenizers.base import Tokenizer

IMPOSSIBLE = -1e30
WIDTH = 32
"""Sources are padded to a multiple of this many tokens, so that few programs compile."""


def target_texts(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    options: SampleConfig,
    notify: Callable[[str], None] = lambda message: None,
) -> list[str]:
    """Returns the target of each source. Uses only `num_beams`, `length_penalty` and `max_new_tokens` of `options`.

    Raises:
        UserError: A source is empty or cannot be encoded.
    """
    end, room = tokenizer.end_of_text, config.block_size
    assert end is not None  # training requires it
    ids = []
    for number, source in enumerate(sources, 1):
        if not source:
            raise UserError(f"prompt {number} is empty; give at least one character")
        tokens = tokenizer.encode(source)
        if len(tokens) >= room:
            notify(f"prompt {number} has {len(tokens):,} tokens; the model reads its first {room - 1:,}")
        ids.append(np.append(tokens[: room - 1], end).astype(np.int32))
    steps = min(options.max_new_tokens, room)
    found = search_targets(config, params, ids, options.num_beams, steps, end, options.length_penalty)
    return [tokenizer.decode(target) for target in found]


def search_targets(
    config: ModelConfig,
    params: dict,
    sources: Sequence[np.ndarray],
    beams: int,
    steps: int,
    end_of_text: int,
    length_penalty: float = 1.0,
) -> list[np.ndarray]:
    """Returns the ids of the best target for each source, without end-of-text.

    The score of a candidate is its log-probability, divided by its length (including end-of-text) to the power
    `length_penalty`. One beam is greedy decoding. A finished candidate keeps its beam until `beams` others are more
    likely.

    Args:
        config: Shape of the model.
        params: As `init_params` returns them.
        sources: Token ids, each ending with end-of-text.
        beams: Number of candidates that are kept after each token.
        steps: Largest number of new tokens, at most `config.block_size`.
        end_of_text: Id that starts and ends a target.
        length_penalty: 1 selects the highest mean log-probability per token.
    """
    width = min(config.block_size, -(-max(len(source) for source in sources) // WIDTH) * WIDTH)
    source_BS = np.zeros((len(sources), width), np.int32)
    for row, source in zip(source_BS, sources, strict=True):
        row[: len(source)] = source
    lengths_B = np.array([len(source) for source in sources], np.int32)
    memories = _read_sources(config, params, source_BS, lengths_B)
    weights = decoding_weights(config, params, "float32", False)
    tokens_BN, count_B = _search(
        config, beams, steps, weights, memories, np.int32(end_of_text), np.float32(length_penalty)
    )
    rows = zip(np.asarray(tokens_BN), np.asarray(count_B), strict=True)
    return [tokens[:count] for tokens, count in rows]


@functools.partial(jax.jit, static_argnums=0)
def _read_sources(config: ModelConfig, params: dict, source_BS: jax.Array, lengths_B: jax.Array) -> tuple[Memory, ...]:
    return layer_memories(config, params, encode(config, params, source_BS, lengths_B))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    config: ModelConfig,
    beams: int,
    steps: int,
    weights: DecodingWeights,
    memories: tuple[Memory, ...],
    end: jax.Array,
    length_penalty: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the best candidate of each source, `[B, N]`, and its number of tokens before end-of-text."""
    B, V = memories[0].keys_BS.shape[0], config.vocab_size
    memories = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), memories)
    cache = init_cache(config, jnp.zeros(B * beams, jnp.int32), steps, "float32")._replace(memory=memories)

    def unfinished(carry):
        n, _, _, _, done_BK, _ = carry
        return (n < steps) & ~jnp.all(done_BK)

    def step(carry):
        n, cache, last_R, scores_BK, done_BK, tokens_BKN = carry
        x_R1D, cache = extend(config, weights.params, last_R[:, None], cache, "float32")
        logits_RV = finish_logits(config, weights.params, project(x_R1D, weights.readout)[:, 0])
        added_BKV = jax.nn.log_softmax(logits_RV).reshape(B, beams, V)
        stays_V = jnp.where(jnp.arange(V) == end, 0.0, IMPOSSIBLE)  # a finished candidate only repeats end-of-text
        added_BKV = jnp.where(done_BK[..., None], stays_V[None, None], added_BKV)
        scores_BK, place_BK = jax.lax.top_k((scores_BK[..., None] + added_BKV).reshape(B, -1), beams)
        beam_BK, token_BK = place_BK // V, place_BK % V
        rows_R = (jnp.arange(B)[:, None] * beams + beam_BK).reshape(-1)
        cache = cache._replace(layers=jax.tree.map(lambda x: x[rows_R], cache.layers))
        tokens_BKN = jnp.take_along_axis(tokens_BKN, beam_BK[..., None], axis=1).at[:, :, n].set(token_BK)
        return n + 1, cache, token_BK.reshape(-1), scores_BK, token_BK == end, tokens_BKN

    first_K = jnp.where(jnp.arange(beams) == 0, 0.0, IMPOSSIBLE)  # all candidates start equal, so only one may continue
    carry = (
        jnp.int32(0),
        cache,
        jnp.full(B * beams, end),
        jnp.broadcast_to(first_K, (B, beams)),
        jnp.zeros((B, beams), bool),
        jnp.full((B, beams, steps), end),
    )
    n, _, _, scores_BK, _, tokens_BKN = jax.lax.while_loop(unfinished, step, carry)
    count_BK = jnp.sum(jnp.cumsum(tokens_BKN == end, axis=-1) == 0, axis=-1)
    best_B = jnp.argmax(scores_BK / jnp.minimum(count_BK + 1, n) ** length_penalty, axis=-1)
    taken_B1 = best_B[:, None]
    tokens_BN = jnp.take_along_axis(tokens_BKN, taken_B1[..., None], axis=1)[:, 0]
    return tokens_BN, jnp.take_along_axis(count_BK, taken_B1, axis=1)[:, 0]
