"""What to generate: prompts, and how their continuations are chosen and end."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.decoding import token_biases
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.choose import choice_numbers, choice_rule
from gptjax.generation.constraint import Constraint
from gptjax.generation.controls import NO_TOKEN, Controls, make_tables


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts, and how their continuations are chosen and end."""

    prompts: Sequence[np.ndarray]
    """Token ids, one array each, none empty."""
    options: SampleConfig
    """Number and length of samples, choice of tokens, precision. Fields that hold texts are not used."""
    end_of_text: int | None = None
    """Id that ends a sequence; None: no such id. `options.ignore_end_of_text` overrides it."""
    bad_words: Sequence[Sequence[int]] = ()
    """Sequences of token ids that are never completed."""
    constraints: Sequence[Constraint] = ()
    """The required form of the new tokens of each sequence; empty: any text. Only `decode.stream` supports them."""
    numbers: Sequence[int] | None = None
    """Numbers of the prompts, which select their random keys; None: 0, 1, 2 ..."""
    is_finished: Callable[[int], bool] = lambda row: False
    """Called with the number of each sequence after each piece; True ends the sequence."""
    notify: Callable[[str], None] = lambda message: None
    """Receives one line when a prompt is cut and, once, when contexts slide."""

    @property
    def rows(self) -> int:
        """Number of sequences: the samples of all prompts."""
        return len(self.prompts) * self.options.num_samples

    @property
    def stop(self) -> int:
        """Id that ends a sequence; `NO_TOKEN` if there is none."""
        return NO_TOKEN if self.end_of_text is None or self.options.ignore_end_of_text else self.end_of_text

    def controls(self, vocab_size: int, rows: int) -> Controls:
        """How the next tokens of `rows` sequences are chosen."""
        rule = choice_rule(self.options, words=bool(self.bad_words))
        rule = rule._replace(bias=rule.bias or bool(self.constraints))
        tables = make_tables(rule, token_biases(self.options), self.bad_words, vocab_size)
        return Controls(rule, choice_numbers(self.options, rows), tables, np.full(rows, self.stop, np.int32))

    def keys(self) -> jax.Array:
        """The random keys of the sequences, `[rows]`, from the numbers of their prompts."""
        numbers = range(len(self.prompts)) if self.numbers is None else self.numbers
        return _row_keys(np.uint32(self.options.seed), np.array(numbers, np.int32), self.options.num_samples)


@functools.partial(jax.jit, static_argnums=2)
def _row_keys(seed: jax.Array, numbers_P: jax.Array, samples: int) -> jax.Array:
    """The random keys of all rows, `[P * samples]`, from the numbers of their prompts."""
    rows = jnp.arange(numbers_P.shape[0] * samples)
    return jax.vmap(lambda row: row_key(seed, numbers_P[row // samples], row % samples))(rows)


@jax.jit
def row_key(seed: jax.Array, prompt: jax.Array | int, sample: jax.Array | int) -> jax.Array:
    """The random key of a sequence, from the seed, the prompt's number and the sample's number."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), prompt), sample)


def check_prompts(config: ModelConfig, prompts: Sequence[np.ndarray], options: SampleConfig) -> None:
    """Checks prompts and options against the model's vocabulary.

    Raises:
        UserError: A prompt is empty or holds an id outside the vocabulary, or an option names such an id.
    """
    for name in ("top_k", "logprobs"):
        if getattr(options, name) > config.vocab_size:
            raise UserError(
                f"{name}={getattr(options, name)} must be at most model.vocab_size={config.vocab_size}"
                + ("; 0 keeps all tokens" if name == "top_k" else "")
            )
    for token in token_biases(options):
        if token >= config.vocab_size:
            raise UserError(f"logit_bias: token {token} is outside model.vocab_size={config.vocab_size}")
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} is empty; give at least one token")
        if np.min(prompt) < 0 or np.max(prompt) >= config.vocab_size:
            outside = next(int(t) for t in prompt if not 0 <= t < config.vocab_size)
            raise UserError(
                f"prompt {number} contains token {outside}, which is outside model.vocab_size={config.vocab_size}"
            )


def check_room(
    config: ModelConfig, prompts: Sequence[np.ndarray], options: SampleConfig, option: str, reads_last: bool = False
) -> None:
    """Checks that prompts and their new tokens fit in the context: with `option` it does not slide.

    `reads_last` says whether the model also reads the last new token.

    Raises:
        UserError: A prompt and its new tokens do not fit.
    """
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) + options.max_new_tokens > config.block_size + (not reads_last):
            raise UserError(
                f"{option}={getattr(options, option)}: prompt {number} has {len(prompt)} tokens, and max_new_tokens="
                f"{options.max_new_tokens} more do not fit in model.block_size={config.block_size}; ask for fewer"
            )
