"""A loop over stacked layers of different kinds. The size of the compiled program does not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def scan_layers(
    apply: Callable[[str, Any, Any], tuple[Any, Any]],
    x: Any,
    stacks: Any,
    kinds: tuple[str, ...],
    unroll: int,
) -> tuple[Any, Any]:
    """Applies layers one after another.

    Layers of one kind are one `lax.scan`. If kinds repeat with a period, one iteration of the scan applies the layers
    of one period. Layers after the last whole period are applied one by one.

    Args:
        apply: A function of the kind, the residual stream and one layer's leaves. Returns the stream and a tree of
            scalars.
        x: The residual stream.
        stacks: Leaves with a leading layer axis.
        kinds: The kind of each layer.
        unroll: Layers per iteration; 0: all.

    Returns:
        The residual stream, and the scalars summed over layers.
    """
    period = _period(kinds)
    whole = len(kinds) // period * period

    def group(x, layers):
        found = []
        for place in range(period):
            one = layers if period == 1 else jax.tree.map(lambda leaf, place=place: leaf[place], layers)
            x, scalars = apply(kinds[place], x, one)
            found.append(scalars)
        return x, jax.tree.map(lambda *parts: sum(parts), *found)

    grouped = (
        stacks
        if period == 1
        else jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // period, period, *leaf.shape[1:]), stacks)
    )
    groups = whole // period
    x, scalars = jax.lax.scan(group, x, grouped, unroll=min(groups, -(-unroll // period)) if unroll else groups)
    total = jax.tree.map(lambda values: jnp.sum(values, axis=0), scalars)
    for layer in range(whole, len(kinds)):
        x, scalars = apply(kinds[layer], x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacks))
        total = jax.tree.map(jnp.add, total, scalars)
    return x, total


def unstack_layers(stacks: Any, count: int) -> list[Any]:
    """The leaves of each layer. The gradient of a split is one concatenation, that of slices a sum of padded arrays."""
    parts = jax.tree.map(lambda leaf: [x[0] for x in jax.lax.split(leaf, (1,) * count)], stacks)
    return [jax.tree.map(lambda leaf, n=n: leaf[n], parts, is_leaf=lambda x: isinstance(x, list)) for n in range(count)]


def _period(kinds: tuple[str, ...]) -> int:
    """The smallest period of the sequence of kinds."""
    return next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
