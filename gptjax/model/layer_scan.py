"""A loop over stacked layers whose kinds may differ, in a program whose size does not grow with depth."""

from collections.abc import Callable
from typing import Any

import jax


def scan_layers(
    apply: Callable[[str, jax.Array, Any], jax.Array], x: jax.Array, stacks: Any, kinds: tuple[str, ...], unroll: int
) -> jax.Array:
    """Applies layers one after another.

    Layers of one kind are one `lax.scan`. Where kinds follow a pattern, one iteration of the scan applies the layers of
    a whole period; layers beyond the last whole period follow it one by one.

    Args:
        apply: A function of a kind, the residual stream and one layer's leaves.
        x: The residual stream.
        stacks: Leaves with a leading layer axis.
        kinds: The kind of each layer.
        unroll: Layers per iteration; 0: all.
    """
    period = _period(kinds)
    whole = len(kinds) // period * period

    def group(x, layers):
        for place in range(period):
            one = layers if period == 1 else jax.tree.map(lambda leaf, place=place: leaf[place], layers)
            x = apply(kinds[place], x, one)
        return x, None

    grouped = (
        stacks
        if period == 1
        else jax.tree.map(lambda leaf: leaf[:whole].reshape(whole // period, period, *leaf.shape[1:]), stacks)
    )
    groups = whole // period
    x, _ = jax.lax.scan(group, x, grouped, unroll=min(groups, -(-unroll // period)) if unroll else groups)
    for layer in range(whole, len(kinds)):
        x = apply(kinds[layer], x, jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacks))
    return x


def _period(kinds: tuple[str, ...]) -> int:
    """The shortest length after which kinds repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
