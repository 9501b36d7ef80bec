"""Schedules and optimizers, as pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from gptjax.config.run import OptimConfig


def make_schedule(config: OptimConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the number of updates made before: a float32 scalar.

    Warm-up is linear and reaches the peak at update `warmup_steps`. cosine: SGDR without restarts
    (arXiv:1608.03983); wsd: warm-up, stable, decay (arXiv:2404.06395, section 4).
    """
    peak, final, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, num_steps - round(config.wsd_decay_fraction * num_steps))

    def schedule(updates: jax.Array) -> jax.Array:
        n = updates.astype(jnp.float32)
        share = jnp.clip((n - start) / max(1, num_steps - start), 0.0, 1.0)  # of the decay that is behind
        if config.schedule == "constant":
            rate = jnp.float32(peak)
        elif config.schedule == "cosine":
            rate = final + 0.5 * (1.0 + jnp.cos(jnp.pi * share)) * (peak - final)
        else:
            rate = peak + share * (final - peak)
        return jnp.where(n < warmup, peak * (n + 1.0) / (warmup + 1.0), rate)

    return schedule


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns clipping, moments and decoupled decay; the caller multiplies its updates by minus the learning rate."""
    moments = {
        "adamw": lambda: optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        "lion": lambda: optax.scale_by_lion(config.beta1, config.beta2),
    }
    clip = optax.clip_by_global_norm(config.grad_clip) if config.grad_clip else optax.identity()
    return optax.chain(clip, moments[config.name](), optax.add_decayed_weights(config.weight_decay, mask=decayed))


def decayed(params: dict) -> dict:
    """True for what weight decay pulls to zero: matrices and embeddings, neither biases nor norms.

    By name, since stacked biases are matrices too.
    """

    def one(path, _leaf):
        name = path[-1].key
        return not (name.startswith("b_") or name in ("scale", "bias", "mix", "distances"))

    return jax.tree_util.tree_map_with_path(one, params)
