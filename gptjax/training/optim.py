"""Optimizers, as pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config.optim import OptimConfig
from gptjax.config.run import Config
from gptjax.training.muon import scale_by_muon
from gptjax.training.schedules import Schedule


class Optimizer(NamedTuple):
    """A transformation of gradients to updates, which the caller subtracts from the parameters."""

    init: Callable[[Any], Any]
    """Parameters to the optimizer's state."""
    update: Callable[..., tuple[Any, Any]]
    """Gradients, state and parameters to updates and the next state."""
    includes_rate: bool = False
    """Whether updates are already multiplied by the learning rate; otherwise the caller does it."""
    average: Callable[[Any, Any], Any] | None = None
    """State and parameters to the average of the parameters, which evaluation uses; None: there is none."""


def make_optimizer(config: OptimConfig, schedule: Schedule = lambda _: jnp.zeros(())) -> Optimizer:
    """Returns clipping, moments and decoupled decay."""
    return OPTIMIZERS[config.name](config, schedule)


def _with_moments(
    moments: Callable[[OptimConfig], optax.GradientTransformation],
) -> Callable[[OptimConfig, Schedule], Optimizer]:
    """The optimizer whose updates are those of `moments` plus weight decay."""
    return lambda config, _: Optimizer(*optax.chain(_clip(config), moments(config), _decay(config)))


def _clip(config: OptimConfig) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()


def _decay(config: OptimConfig) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=decayed)


def _schedule_free(config: OptimConfig, schedule: Schedule) -> Optimizer:
    """AdamW that averages its iterates instead of decaying the rate (arXiv:2405.15682)."""
    adam = optax.scale_by_adam(0.0, config.beta2, config.eps)
    base = optax.chain(adam, _decay(config), optax.scale_by_learning_rate(lambda n: schedule(jnp.asarray(n))))
    # schedule_free counts updates from 1, scale_by_learning_rate from 0.
    free = optax.contrib.schedule_free(base, lambda n: schedule(jnp.asarray(n) - 1), config.beta1)
    return Optimizer(
        *optax.chain(_clip(config), free, optax.scale(-1.0)),
        includes_rate=True,
        average=lambda state, params: optax.contrib.schedule_free_eval_params(state[1], params),
    )


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _lion(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_lion(config.beta1, config.beta2)


def _adafactor(config: OptimConfig) -> optax.GradientTransformation:
    """Second moments of matrices as a product of two vectors; no first moments (arXiv:1804.04235, sections 3 and 6)."""
    factored = optax.scale_by_factored_rms(decay_rate=config.factored_decay, min_dim_size_to_factor=32)
    return optax.chain(factored, optax.clip_by_block_rms(1.0))


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    """Muon for the matrices of blocks, Adam for all else."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if in_block_matrix(path) else "adam", params)

    return optax.partition({"muon": scale_by_muon(config.muon_beta), "adam": _adam(config)}, labels)


OPTIMIZERS: dict[str, Callable[[OptimConfig, Schedule], Optimizer]] = {
    "adamw": _with_moments(_adam),
    "lion": _with_moments(_lion),
    "adafactor": _with_moments(_adafactor),
    "muon": _with_moments(_muon),
    "schedule_free": _schedule_free,
}
"""By `optim.name`."""


def in_block_matrix(path: tuple) -> bool:
    """Whether a path of the parameters leads to a matrix of a block."""
    return any(getattr(key, "key", None) == "blocks" for key in path) and path[-1].key.startswith("w_")


def rate_factors(config: Config, params: dict) -> dict | None:
    """Factor of the learning rate of each parameter, by its group; None: all are 1.

    With muP, matrices of blocks learn at a rate in proportion to 1 / width (arXiv:2203.03466, table 8, Adam). Updates
    of muon have a norm that suits every width.
    """
    optim = config.optim
    muon = optim.muon_learning_rate / optim.learning_rate if optim.name == "muon" else None
    matrices = config.model.width_ratio if muon is None else muon
    if matrices == optim.embedding_rate == optim.head_rate == 1.0:
        return None

    def one(path, _leaf):
        if in_block_matrix(path):
            return jnp.float32(matrices)
        if path[0].key == "embed" and path[-1].key == "tokens":
            return jnp.float32(optim.embedding_rate)
        return jnp.float32(optim.head_rate if path[0].key == "head" else 1.0)

    return jax.tree_util.tree_map_with_path(one, params)


def decayed(params: dict) -> dict:
    """True for the parameters that weight decay applies to: matrices and embeddings, neither biases nor norms.

    By name, since stacked biases are matrices too.
    """

    def one(path, _leaf):
        name = path[-1].key
        return not (name.startswith("b_") or name in ("scale", "bias", "mix", "value_mix", "skip", "distances", "idf"))

    return jax.tree_util.tree_map_with_path(one, params)
