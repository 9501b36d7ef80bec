"""A model folder of Hugging Face ⇄ config and parameters, through the tables in `families/`."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.config.task import TaskConfig
from gptjax.errors import UserError, did_you_mean, readable_values
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.families.family import Entry, Family, choose_family, normal_form
from gptjax.exchange.families.fields import Fields
from gptjax.exchange.hf_files import (
    make_empty_folder,
    open_tensors,
    read_config,
    write_json,
    write_tensors,
)
from gptjax.exchange.hf_tokenizer import export_tokenizer, import_tokenizer, pad_token
from gptjax.exchange.label_models import (
    LabelHead,
    head_config,
    head_kind,
    head_name,
    head_tensors,
    read_head,
    read_task,
)
from gptjax.exchange.tokenizer_files import CHAT_TEMPLATE, read_tokenizer_files
from gptjax.model.gpt import init_params
from gptjax.text.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model read from another program's files."""

    model: ModelConfig
    params: dict
    """Structure of `init_params`, float32."""
    tokenizer: Tokenizer | None
    """None if the files have no tokenizer that can be converted."""
    chat_template: str = ""
    """Source of the Jinja chat template; empty: none."""
    end_ids: tuple[int, ...] = ()
    """End-of-text ids of the model's config."""
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    """The task of the head; a classification head is in `params["heads"]`."""


def import_model(hf_dir: Path, notify: Callable[[str], None] = lambda message: None) -> Imported:
    """Reads a folder that `save_pretrained` of a model (and of its tokenizer) wrote.

    The model is a causal language model, or a classifier of texts or words. A classifier has no output projection, so
    the embedding is used as its output projection.

    Args:
        hf_dir: Folder with config.json and model.safetensors (one file or parts) in float32, float16 or bfloat16.
        notify: Receives one line about unknown fields of config.json, and one if there is no tokenizer or it cannot be
            converted exactly.

    Raises:
        UserError: The folder does not exist, a file is damaged, the model is not supported, or a tensor is missing,
            unknown or has another shape than config.json says.
    """
    raw = read_config(hf_dir)
    family, model = read_model_config(raw, str(hf_dir / "config.json"), notify)
    with readable_values(str(hf_dir / "config.json")):
        kind, task = head_kind(raw), TaskConfig()
    if kind:
        model = dataclasses.replace(model, tied_embeddings=True)
    with open_tensors(hf_dir) as (shapes, read):
        name = head_name(family, kind)
        head = {key: read(key) for key in shapes if kind and key in (f"{name}.weight", f"{name}.bias")}
        shapes = {key: shape for key, shape in shapes.items() if key not in head}
        params = read_params(family, model, shapes, read, str(hf_dir))
    if kind:
        params["heads"] = {kind: read_head(head, name, model, str(hf_dir))}
        with readable_values(str(hf_dir / "config.json")):
            task = read_task(raw, kind, len(params["heads"][kind]["w"]))
        notify(f"{hf_dir}: gptjax puts the end token around a text before it labels it; the model may not have seen it")
    with readable_values(f"a tokenizer file of {hf_dir}"):
        files = read_tokenizer_files(hf_dir)
    tokenizer = import_tokenizer(files, model.vocab_size, notify)
    return Imported(model, params, tokenizer, files.chat_template, files.end_ids, task)


def export_model(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer | None,
    to: Path,
    notify: Callable[[str], None] = lambda message: None,
    family_name: str = "",
    shard_bytes: int = 0,
    chat_template: str = "",
    head: LabelHead | None = None,
) -> None:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        model: Shape of the model.
        params: Structure of `init_params`, any float dtype. Written as float32, without padded vocabulary rows.
        tokenizer: Written if it is a byte-pair encoding; None: the folder gets no tokenizer.
        to: Folder to create; it may exist if it is empty.
        notify: Receives one line if transformers cannot read the tokenizer.
        family_name: The `model_type` to write; empty: the first equivalent one.
        shard_bytes: Largest size of a file of tensors; 0: one file.
        chat_template: Source of the Jinja chat template, written next to the tokenizer.
        head: Written instead of the output projection; the tokenizer then adds the end tokens that gptjax adds.

    Raises:
        UserError: No family is equivalent to the model, or the folder is not empty.
    """
    families = {
        name: family for name, family in FAMILIES.items() if head is None or head.task.kind in family.label_heads
    }
    if family_name and family_name not in families:
        raise UserError(f"family={family_name} has no class of transformers for a head of labels; choose another one")
    wanted = model if head is None else dataclasses.replace(model, tied_embeddings=True)
    family = choose_family(families, wanted, family_name)
    end = None if tokenizer is None else tokenizer.end_of_text
    config, added = hf_config(family, wanted, end), dict[str, np.ndarray]()
    if head is not None:
        added, params = head_tensors(family, head, params)
        config |= head_config(family, head.task, pad_token(tokenizer))
    make_empty_folder(to)
    write_tensors(to, itertools.chain(tensors_of(family, wanted, params), added.items()), shard_bytes)
    write_json(to / "config.json", config)
    if head is None:
        write_json(to / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    if tokenizer is not None:
        export_tokenizer(tokenizer, model.block_size, to, notify, "" if head is None else head.task.kind)
    if chat_template:
        (to / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def read_model_config(raw: dict, where: str, notify: Callable[[str], None]) -> tuple[Family, ModelConfig]:
    """Returns the family and the model config that a config.json describes.

    Raises:
        UserError: The family or an option of the model is not supported.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{where}: model_type={name!r} is not supported; supported: {', '.join(FAMILIES)}."
            f"{did_you_mean(str(name), FAMILIES)}"
        )
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config is not supported; save the model dequantized, or as GGUF")
    fields = Fields(raw, where)
    try:
        with readable_values(where):
            model = normal_form(FAMILIES[name].read(fields))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
    for note in fields.notes:
        notify(f"{where}: {note}")
    if unread := fields.unread():
        values = ", ".join(f"{key}={json.dumps(raw[key])[:40]}" for key in unread)
        notify(f"{where}: not fields of {name}, so they change nothing in transformers either: {values}")
    return FAMILIES[name], model


def hf_config(family: Family, model: ModelConfig, end_of_text: int | None) -> dict:
    """The content of config.json."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.write(model),
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": "float32",
    }


def read_params(
    family: Family,
    model: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    where: str,
) -> dict:
    """Converts the tensors of a file to our parameters.

    Args:
        family: Names of tensors.
        model: Shape of the model.
        shapes: Shapes of the tensors in the file; their names may lack the family's prefix.
        read: Returns one tensor, given its name.
        where: The file, for error messages.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    names = _names_in_file(family, model, shapes, where)

    def parts(entry: Entry, layer: str) -> tuple[np.ndarray, ...]:
        theirs = tuple(read(names[layer + name]).astype(np.float32) for name in entry.names)
        return entry.to_ours(model, theirs)

    params: dict = {}
    for entry in _present(family.outer, _leaves(model)):
        for leaf, x in zip(entry.leaves, parts(entry, ""), strict=True):
            _put(params, leaf, jnp.asarray(x))
    for entry in _present(family.block, _leaves(model)["blocks"]):
        layers = zip(*(parts(entry, family.layer.format(i)) for i in range(model.n_layer)), strict=True)
        for leaf, xs in zip(entry.leaves, layers, strict=True):
            _put(params, f"blocks/{leaf}", jnp.asarray(np.stack(xs)))
    if not model.tied_embeddings:
        params["head"] = {"w": jnp.asarray(read(family.head).astype(np.float32))}
    elif family.head in shapes:
        embedding = names[_embedding(family).names[0]]
        if not np.array_equal(read(family.head), read(embedding)):
            raise UserError(
                f"{where}: {family.head} differs from {embedding} although tie_word_embeddings is true; set it to"
                " false in config.json if the model has an output projection of its own"
            )
    return params


def tensors_of(family: Family, model: ModelConfig, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yields names and float32 tensors for Hugging Face, without padded vocabulary rows."""
    for name, layer, entry in _places(family, model):
        leaves = (_get(params if layer is None else params["blocks"], leaf) for leaf in entry.leaves)
        ours = tuple(np.asarray(leaf if layer is None else leaf[layer]).astype(np.float32) for leaf in leaves)
        if entry.leaves == ("embed/tokens",):
            ours = (ours[0][: model.vocab_size],)
        yield from zip(name, entry.to_theirs(model, ours), strict=True)
    if not model.tied_embeddings:
        yield family.head, np.asarray(params["head"]["w"][: model.vocab_size]).astype(np.float32)


def tensor_shapes(family: Family, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file, by its full name."""
    leaves = _leaves(dataclasses.replace(model, vocab_multiple=1))
    shapes = {}
    cached: dict[Entry, tuple[tuple[int, ...], ...]] = {}
    for names, layer, entry in _places(family, model):
        if entry not in cached:
            tree, skip = (leaves, 0) if layer is None else (leaves["blocks"], 1)
            empty = (np.broadcast_to(np.float16(0), _get(tree, leaf).shape[skip:]) for leaf in entry.leaves)
            cached[entry] = tuple(x.shape for x in entry.to_theirs(model, tuple(empty)))
        shapes |= dict(zip(names, cached[entry], strict=True))
    return shapes if model.tied_embeddings else shapes | {family.head: (model.vocab_size, model.n_embd)}


def _places(family: Family, model: ModelConfig) -> Iterator[tuple[list[str], int | None, Entry]]:
    """Names in the file, layer and entry of every tensor."""
    leaves = _leaves(model)
    for entry in _present(family.outer, leaves):
        yield [family.prefix + name for name in entry.names], None, entry
    for layer in range(model.n_layer):
        for entry in _present(family.block, leaves["blocks"]):
            yield [family.prefix + family.layer.format(layer) + name for name in entry.names], layer, entry


def _names_in_file(family: Family, model: ModelConfig, found: dict, where: str) -> dict[str, str]:
    """Maps each tensor's name without prefix to its name in the file; checks that the file contains this model."""
    expected = {name.removeprefix(family.prefix): shape for name, shape in tensor_shapes(family, model).items()}
    names = {name.removeprefix(family.prefix): name for name in found}
    for name, shape in expected.items():
        if name not in names:
            raise UserError(f"{where}: tensor {name} {list(shape)} is missing")
        if found[names[name]] != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(found[names[name]])}, its config says {list(shape)}"
            )
    layer = re.escape(family.layer).replace(r"\{\}", r"\d+")
    buffers = "|".join(map(re.escape, family.buffers))
    ignored = re.compile(rf"{layer}(?:{buffers})|{re.escape(family.head)}")
    unknown = sorted(name for name in names.keys() - expected.keys() if not ignored.fullmatch(name))
    if unknown:
        raise UserError(
            f"{where}: tensor {names[unknown[0]]} is not part of a {family.model_type} with {model.n_layer} layers"
        )
    return names


@functools.cache
def _leaves(model: ModelConfig) -> dict:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def _present(entries: tuple[Entry, ...], leaves: dict) -> Iterator[Entry]:
    return (entry for entry in entries if _get(leaves, entry.leaves[0]) is not None)


def _embedding(family: Family) -> Entry:
    return next(entry for entry in family.outer if entry.leaves == ("embed/tokens",))


def _get(tree: Any, leaf: str) -> Any:
    """The leaf of this name, or None."""
    for part in leaf.split("/"):
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def _put(tree: dict, leaf: str, value: jax.Array) -> None:
    *parts, last = leaf.split("/")
    for part in parts:
        tree = tree.setdefault(part, {})
    tree[last] = value
