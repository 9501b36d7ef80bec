"""Gradient norms and sizes of updates by layer, computed in the training step.

Shape suffixes: G group, that is a layer, or the parameters outside the layers.
"""

from typing import Any

import jax
import jax.numpy as jnp

STACKED = ("blocks/", "adapters/", "encoder/blocks/")
"""Parameters with a leading axis of layers."""


def group_names(params: dict, n_layer: int) -> tuple[str, ...]:
    """Names of the groups of trainable parameters, in the order of `group_norms`: `embed`, `layer_0`, ..., `norm_f`."""
    found = {name for path, leaf in jax.tree_util.tree_leaves_with_path(params) for name in _rows(path, leaf, n_layer)}
    return tuple(sorted(found, key=_place))


def group_norms(tree: dict, n_layer: int) -> jax.Array:
    """Norm of each group, float32 `[G]`, of a tree with the structure of the trainable parameters."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = _rows(path, leaf, n_layer)
        whole = len(names) == 1 and not _is_stack(path)
        sums = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=None if whole else tuple(range(1, leaf.ndim)))
        for name, value in zip(names, sums.reshape(-1), strict=True):
            squares[name] = squares.get(name, jnp.float32(0.0)) + value
    return jnp.sqrt(jnp.stack([squares[name] for name in group_names(tree, n_layer)]))


def by_layer(grads: dict, updates: dict, params: dict, n_layer: int) -> dict[str, jax.Array]:
    """Returns `grad_norm` and `update_ratio`, float32 `[G]`: the norm of the change of a group's parameters, divided by
    the norm of the parameters; NaN where they are all zero.
    """
    weights_G = group_norms(params, n_layer)
    ratio_G = jnp.where(weights_G > 0, group_norms(updates, n_layer) / weights_G, jnp.nan)
    return {"grad_norm": group_norms(grads, n_layer), "update_ratio": ratio_G}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_stack(path: Any) -> bool:
    return _name(path).startswith(STACKED)


def _rows(path: Any, leaf: Any, n_layer: int) -> list[str]:
    """The groups of a parameter: one for each layer of a stack, whose last layer is the model's last."""
    if not _is_stack(path):
        return [_name(path).partition("/")[0]]
    if _name(path).startswith("encoder/"):
        return [f"encoder_layer_{row}" for row in range(leaf.shape[0])]
    return [f"layer_{n_layer - leaf.shape[0] + row}" for row in range(leaf.shape[0])]


def _place(name: str) -> tuple[int, int, str]:
    """Sorts groups as data passes them."""
    kind, _, number = name.rpartition("_")
    order = {"embed": 0, "prompt": 0, "encoder_layer": 1, "encoder": 2, "layer": 3}
    return order.get(kind if number.isdigit() else name, 4), int(number) if number.isdigit() else 0, name
