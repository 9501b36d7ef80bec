"""Initializes the parameters of a run, splits them into trainable and frozen ones, and scales learning rates."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.model.gpt import init_params
from gptjax.model.multi_token import init_multi_token_heads
from gptjax.tasks.heads import init_task_head

NEW = ("adapters/", "prompt/", "heads/")  # parameters that a base model does not have
START = "start"
"""Name of the parameters of `init_from` among the frozen parameters, for `finetune.mixout`. The model ignores them."""
MIXOUT = 2**20
"""Constant that separates the random stream of mixout from those of dropout, whose constants are layer numbers."""


def init_all(config: Config, key: jax.Array, base: dict | None = None) -> dict:
    """Initializes all float32 parameters of a run: model, adapters, heads. Takes parameters from `base` if it has
    them.
    """
    params = init_params(config.model, key)
    if base is not None and "embed" in base and "prompt" in params:
        # Prompts initialized with embeddings of words train better than random ones (arXiv:2104.08691, section 3.2).
        words = jax.random.randint(key, (config.model.adapter.tokens,), 0, config.model.vocab_size)
        params["prompt"] = {"w": base["embed"]["tokens"][words].astype(jnp.float32)}
    given = base or {}
    given_heads = given.get("heads", {})
    params |= without_heads(given)
    heads = {
        name: init_task_head(config.model, task, jax.random.fold_in(key, number))
        for number, (name, task) in enumerate(config.heads.items(), 1)
    }
    objective = config.task.objective
    if objective.kind == "multi_token":
        heads["ahead"] = init_multi_token_heads(
            config.model, objective.ahead - 1, jax.random.fold_in(key, len(heads) + 1)
        )
    heads = {name: head | given_heads.get(name, {}) for name, head in heads.items()}
    return params | {"heads": heads} if heads else params


def init_split(config: Config, given: dict | None = None) -> tuple[dict, dict]:
    """Initializes the parameters of a run from `config.seed`, in `train.param_dtype`: trainable and frozen ones.

    Parameters in `given` are used as they are.
    """
    drawn = init_all(config, jax.random.key(config.seed), given)
    learning, frozen = split(config, jax.tree.map(lambda p: p.astype(config.train.param_dtype), drawn))
    if config.finetune.mixout:
        frozen = frozen | {START: jax.tree.map(jnp.copy, without_heads(learning))}
    return learning, frozen


def without_heads(params: dict) -> dict:
    """The parameters without heads, from which another run starts: heads belong to one task."""
    return {name: part for name, part in params.items() if name != "heads"}


def split(config: Config, params: dict) -> tuple[dict, dict]:
    """Splits params into trainable and frozen ones; with train=top, the stack of blocks is split in two.

    Raises:
        UserError: A pattern of `finetune.paths` names no parameter.
    """
    options = config.finetune
    if options.train == "all":
        return params, {}
    named = _flatten(params)
    for pattern in options.paths:
        if not any(re.search(pattern, name) for name in named):
            raise UserError(f"finetune.paths: {pattern!r} matches no parameter; the names are: {', '.join(named)}")
    learned, fixed = {}, {}
    for name, leaf in named.items():
        if options.train == "top" and name.startswith("blocks/"):
            cut = config.model.n_layer - options.top_k
            learned[name] = leaf[cut:]
            if cut:
                fixed[name] = leaf[:cut]
            continue
        chosen = name.startswith(NEW) or any(re.search(pattern, name) for pattern in options.paths)
        chosen = chosen or (options.train == "top" and name.startswith("norm_f/"))
        (learned if chosen else fixed)[name] = leaf
    return _unflatten(learned), _unflatten(fixed)


def join(trainable: dict, frozen: dict) -> dict:
    """Inverse of `split`."""
    fixed, learned = _flatten(_of_model(frozen)), _flatten(trainable)
    cut = {name: jnp.concatenate([fixed[name], learned[name]]) for name in fixed if name in learned}
    return _unflatten(fixed | learned | cut)


def forward_params(trainable: dict, frozen: dict) -> dict:
    """Like `join`, but frozen blocks fixed a separate stack, so that the backward pass ends above them."""
    fixed, learned = _flatten(_of_model(frozen)), _flatten(trainable)
    params = _unflatten(fixed | learned)
    return params | {"blocks": (frozen["blocks"], trainable["blocks"])} if fixed.keys() & learned.keys() else params


def mixed_with_start(config: Config, trainable: dict, frozen: dict, key: jax.Array) -> dict:
    """Replaces a random share of the weights by those of `init_from`; the expectation of each weight stays the same.

    Heads are not changed. Source: mixout, arXiv:1909.11299, equation 3.
    """
    share = config.finetune.mixout
    weights, tree = jax.tree.flatten(without_heads(trainable))
    keys = jax.random.split(jax.random.fold_in(key, MIXOUT), len(weights))
    mixed = [
        (jnp.where(jax.random.bernoulli(k, share, w.shape), s, w) - share * s) / (1.0 - share)
        for k, w, s in zip(keys, weights, jax.tree.leaves(frozen[START]), strict=True)
    ]
    return trainable | jax.tree.unflatten(tree, mixed)


def _of_model(frozen: dict) -> dict:
    return {name: part for name, part in frozen.items() if name != START}


def rates(config: Config, trainable: dict) -> dict | None:
    """Factors of the learning rate, a scalar or `[L, 1, ...]` for each leaf; None if all are 1."""
    options, model = config.finetune, config.model
    if options.layer_decay == 1.0 and not options.head_learning_rate:
        return None
    head = options.head_learning_rate / config.optim.learning_rate if options.head_learning_rate else 1.0

    def one(name: str, leaf: jax.Array):
        if name.startswith("heads/"):
            return jnp.float32(head)
        if name.startswith(("blocks/", "adapters/")):
            below_top = jnp.arange(leaf.shape[0], dtype=jnp.float32)[::-1]
            return (options.layer_decay**below_top).reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.float32(options.layer_decay**model.n_layer if name.startswith(("embed/", "prompt/")) else 1.0)

    return _unflatten({name: one(name, leaf) for name, leaf in _flatten(trainable).items()})


def _flatten(params: dict) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _unflatten(named: dict[str, Any]) -> dict:
    nested: dict = {}
    for name, leaf in named.items():
        *parts, last = name.split("/")
        place = nested
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = leaf
    return nested
