"""Describes one family of models: its config.json, its tensors, and their conversion to our parameters.

Shape suffixes: D n_embd, F MLP width, G key and value heads, R = H / G query heads of each, E = R + 2, C head width.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.task import AdapterConfig
from gptjax.errors import UserError
from gptjax.exchange.families.fields import Fields

Arrays = tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Leaves of our parameters and the corresponding tensors of the family. For blocks: those of one layer."""

    leaves: tuple[str, ...]
    names: tuple[str, ...]
    to_ours: Callable[[ModelConfig, Arrays], Arrays]
    to_theirs: Callable[[ModelConfig, Arrays], Arrays]


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str
    """The class that `architectures` in config.json names."""
    read: Callable[[Fields], ModelConfig]
    """Converts config.json to our config; raises `UserError` for unsupported options."""
    write: Callable[[ModelConfig], dict]
    """Inverse of `read` for models of this family. For other models it may omit options that the family lacks."""
    outer: tuple[Entry, ...]
    """Tensors outside of layers; entries whose leaf the model does not have are ignored."""
    block: tuple[Entry, ...]
    prefix: str = "model."
    """Prefix of all tensors except the output projection. Files without the prefix can also be read."""
    layer: str = "layers.{}."
    head: str = "lm_head.weight"
    buffers: tuple[str, ...] = ()
    """Tensors of a layer that old versions saved although they are no parameters."""
    label_heads: tuple[str, ...] = ("classify", "tag")
    """Kinds of tasks for which transformers has a class."""
    tag_head: str = "score"
    """Name of the token classification head."""
    conv1d: bool = False
    """Whether linear layers store their inputs first, as GPT-2's class Conv1D does."""


def same(leaf: str, name: str) -> Entry:
    """A tensor with the same layout in both."""
    return Entry((leaf,), (name,), lambda model, parts: parts, lambda model, parts: parts)


def transposed(leaf: str, name: str) -> Entry:
    """A matrix that the family stores as `[out, in]`."""
    return Entry((leaf,), (name,), lambda model, parts: (parts[0].T,), lambda model, parts: (parts[0].T,))


def one_plus(leaf: str, name: str) -> Entry:
    """A scale that the family stores minus 1."""
    return Entry((leaf,), (name,), lambda model, parts: (1.0 + parts[0],), lambda model, parts: (parts[0] - 1.0,))


def separate_qkv(leaf: str, q: str, k: str, v: str) -> Entry:
    """Three linear layers `[heads C, D]`, or their biases."""
    return Entry((leaf,), (q, k, v), _pack_qkv, _unpack_qkv)


def stacked_qkv(leaf: str, name: str) -> Entry:
    """One linear layer `[(H + 2 G) C, D]`: all queries, then all keys, then all values."""

    def to_ours(model: ModelConfig, parts: Arrays) -> Arrays:
        queries, keys = model.n_head * model.head_width, model.kv_heads * model.head_width
        return _pack_qkv(model, tuple(np.split(parts[0], (queries, queries + keys))))

    return Entry((leaf,), (name,), to_ours, lambda model, parts: (np.concatenate(_unpack_qkv(model, parts)),))


def interleaved_qkv(leaf: str, name: str) -> Entry:
    """One linear layer `[H 3 C, D]`, or its bias: query, key and value of each head are adjacent, as in ours."""

    def to_ours(model: ModelConfig, parts: Arrays) -> Arrays:
        x = parts[0].T
        return (x.reshape(*x.shape[:-1], model.kv_heads, -1, model.head_width),)

    return Entry((leaf,), (name,), to_ours, lambda model, parts: (_flat_heads(parts[0], 3).T,))


def conv1d_qkv(leaf: str, name: str) -> Entry:
    """GPT-2's `[D, 3 D]`, or its bias: all queries, then all keys, then all values."""

    def to_ours(model: ModelConfig, parts: Arrays) -> Arrays:
        x = parts[0].reshape(*parts[0].shape[:-1], 3, model.n_head, model.head_width)
        return (np.swapaxes(x, -3, -2),)

    return Entry((leaf,), (name,), to_ours, lambda model, parts: (_flat_heads(np.swapaxes(parts[0], -3, -2), 3),))


def gate_and_up(gate: str, up: str, name: str) -> Entry:
    """One linear layer `[2 F, D]`: the gate, then the up projection."""

    def to_ours(model: ModelConfig, parts: Arrays) -> Arrays:
        return tuple(half.T for half in np.split(parts[0], 2))

    return Entry((gate, up), (name,), to_ours, lambda model, parts: (np.concatenate([part.T for part in parts]),))


def normal_form(model: ModelConfig) -> ModelConfig:
    """A config of the same function in canonical form, in which every default is resolved."""
    changes: dict = {}
    if model.kv_heads == model.n_head:
        changes["n_kv_head"] = 0
    if model.head_width * model.n_head == model.n_embd:
        changes["head_dim"] = 0
    if model.mlp_size == dataclasses.replace(model, mlp_width=0).mlp_size:
        changes["mlp_width"] = 0
    if math.isclose(model.attention_scale, model.head_width**-0.5):
        changes["attention_scale"] = 0.0
    if model.rope_original_length == model.block_size:
        changes["rope_original_length"] = 0
    if model.rope_scaling == "linear" and model.rope_factor == 1.0:
        changes |= {"rope_scaling": "none"}
    if model.rope_scaling == "ntk":
        rotated = 2 * round(model.rope_fraction * model.head_width / 2)
        base = model.rope_base * model.rope_factor ** (rotated / max(1, rotated - 2))
        changes |= {"rope_scaling": "none", "rope_factor": 1.0, "rope_base": base}
    pattern = shortest_pattern(model.attention_pattern)
    if pattern == ("local",) and model.rope_local_base:
        unscaled = {"rope_scaling": "none", "rope_factor": 1.0, "rope_original_length": 0}
        unscaled |= {"rope_low_frequency_factor": 1.0, "rope_high_frequency_factor": 4.0}
        changes |= {"rope_base": model.rope_local_base, **unscaled}
    same_base = model.rope_local_base == model.rope_base and model.rope_scaling == "none"
    if len(set(pattern)) < 2 or same_base:
        changes["rope_local_base"] = 0.0
    changes["attention_pattern"] = () if pattern in (("full",), ("local",)) else pattern
    return dataclasses.replace(model, **changes)


def shortest_pattern(kinds: tuple) -> tuple:
    """The shortest part whose repetition gives the kinds of all layers."""
    lengths = range(1, len(kinds) + 1)
    return next((kinds[:n] for n in lengths if all(k == kinds[i % n] for i, k in enumerate(kinds))), ())


def differences(family: Family, model: ModelConfig) -> dict[str, object]:
    """The options of a model that the family does not support, with the family's values."""
    ignored = {"dropout": 0.0, "vocab_multiple": 1, "init": "gpt2", "adapter": AdapterConfig()}
    wanted = normal_form(dataclasses.replace(model, **ignored))
    fields = Fields({"model_type": family.model_type} | family.write(wanted), family.model_type)
    found = normal_form(dataclasses.replace(family.read(fields), **ignored))
    pairs = ((f.name, getattr(wanted, f.name), getattr(found, f.name)) for f in dataclasses.fields(ModelConfig))
    return {name: theirs for name, ours, theirs in pairs if not _equal(ours, theirs)}


def choose_family(families: dict[str, Family], model: ModelConfig, name: str = "") -> Family:
    """The family for exporting a model: the one of this name, or the first equivalent one.

    Raises:
        UserError: The family, or every family, differs from the model; the message names the options.
    """
    if name:
        families = {name: families[name]}
    missing, refusal = {}, UserError("no family of models is known")
    for key, family in families.items():
        try:
            missing[key] = differences(family, model)
        except UserError as error:  # the family's reader refuses what its writer made of this model
            refusal = error
    if not missing:
        raise refusal
    nearest = min(missing, key=lambda key: len(missing[key]))
    if not missing[nearest]:
        return families[nearest]
    ours = ", ".join(f"model.{field}={getattr(model, field)!r}" for field in missing[nearest])
    theirs = ", ".join(f"{field}={value!r}" for field, value in missing[nearest].items())
    what = f"a {nearest} model has" if name else f"no family of models has this; the nearest, {nearest}, has"
    raise UserError(f"{ours}: {what} {theirs}; this model cannot be exported as one")


def _equal(ours: object, theirs: object) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs


def _pack_qkv(model: ModelConfig, parts: Arrays) -> Arrays:
    """`[out, D]` or `[out]` of queries, keys and values → `[D, G, E, C]` or `[G, E, C]`."""
    G, C = model.kv_heads, model.head_width
    heads = [part.T.reshape(*part.T.shape[:-1], G, -1, C) for part in parts]
    return (np.concatenate(heads, axis=-2),)


def _unpack_qkv(model: ModelConfig, parts: Arrays) -> Arrays:
    R = model.n_head // model.kv_heads
    return tuple(_flat_heads(heads, 3).T for heads in np.split(parts[0], (R, R + 1), axis=-2))


def _flat_heads(x: np.ndarray, axes: int) -> np.ndarray:
    return x.reshape(*x.shape[:-axes], -1)
