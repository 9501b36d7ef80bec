"""GPT-2 as Hugging Face stores it.

Shape suffixes: L layer, D n_embd, H heads, E = 3 (query, key, value), C head_dim, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.exchange.hf_files import (
    WEIGHTS,
    make_empty_folder,
    open_tensors,
    read_config,
    write_json,
    write_tensors,
)
from gptjax.exchange.hf_tokenizer import export_tokenizer, import_tokenizer
from gptjax.ops.elementwise import NORM_EPSILON
from gptjax.text.tokenizer import Tokenizer

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # two names of the tanh form
PREFIX = "transformer."
HEAD = "lm_head.weight"

# Ours → theirs; what is laid out differently passes through `_to_ours` and `_to_theirs`.
OUTER = {
    ("embed", "tokens"): "wte.weight",
    ("embed", "positions"): "wpe.weight",
    ("norm_f", "scale"): "ln_f.weight",
    ("norm_f", "bias"): "ln_f.bias",
}
BLOCK = {
    ("norm_1", "scale"): "ln_1.weight",
    ("norm_1", "bias"): "ln_1.bias",
    ("attn", "w_qkv"): "attn.c_attn.weight",
    ("attn", "b_qkv"): "attn.c_attn.bias",
    ("attn", "w_out"): "attn.c_proj.weight",
    ("attn", "b_out"): "attn.c_proj.bias",
    ("norm_2", "scale"): "ln_2.weight",
    ("norm_2", "bias"): "ln_2.bias",
    ("mlp", "w_in"): "mlp.c_fc.weight",
    ("mlp", "b_in"): "mlp.c_fc.bias",
    ("mlp", "w_out"): "mlp.c_proj.weight",
    ("mlp", "b_out"): "mlp.c_proj.bias",
}
BUFFERS = ("attn.bias", "attn.masked_bias")  # masks that old versions saved; not parameters


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model read from another program's files."""

    model: ModelConfig
    params: dict
    """As `init_params` makes them, float32."""
    tokenizer: Tokenizer | None
    """None where the folder has none that can be converted."""


def import_gpt2(hf_dir: Path, notify: Callable[[str], None] = lambda message: None) -> Imported:
    """Reads a folder that `GPT2LMHeadModel.save_pretrained` (and the tokenizer's) wrote.

    Args:
        hf_dir: Holds config.json and model.safetensors, whole or in parts; float32, float16 or bfloat16.
        notify: Told in one line where there is no tokenizer, or none that can be converted exactly.

    Raises:
        UserError: No such folder, a damaged file, a variant of GPT-2 that computes something else, or a tensor that is
            missing, unknown or of another shape than config.json says.
    """
    raw = read_config(hf_dir)
    with open_tensors(hf_dir) as (shapes, read):
        model = _model_config(raw, str(hf_dir / "config.json"))
        names = _file_names(model, shapes, hf_dir)
        params = _params(model, lambda name: read(names[name]).astype(np.float32))
        if model.tied_embeddings and HEAD in shapes and not np.array_equal(read(HEAD), read(names["wte.weight"])):
            raise UserError(
                f"{hf_dir}: {HEAD} differs from wte.weight although tie_word_embeddings is true; set it to false in"
                " config.json if the model has a readout of its own"
            )
    return Imported(model, params, import_tokenizer(hf_dir, model.vocab_size, notify))


def export_gpt2(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer | None,
    to: Path,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Writes a folder that `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        model: Shape of the model.
        params: As `init_params` makes them, any float dtype; written as float32, rows that pad the vocabulary cut off.
        tokenizer: Written where it is a byte-pair encoding; None: the folder gets no tokenizer.
        to: Folder to make; an empty one will do.
        notify: Told in one line where the tokenizer has no form that transformers reads.

    Raises:
        UserError: The model is not a GPT-2, or the folder holds files.
    """
    _check_exportable(model)
    make_empty_folder(to)
    write_tensors(to, _tensors(model, params))
    end = None if tokenizer is None else tokenizer.end_of_text
    write_json(to / "config.json", _hf_config(model, end))
    write_json(to / "generation_config.json", {"bos_token_id": end, "eos_token_id": end})
    if tokenizer is not None:
        export_tokenizer(tokenizer, model.block_size, to, notify)


def _model_config(raw: dict, where: str) -> ModelConfig:
    """Checks that config.json means the function that we compute; keys that are missing have transformers' default."""

    def need(name: str, default, *allowed):
        if raw.get(name, default) not in allowed:
            raise UserError(
                f"{where}: {name}={raw[name]!r} is not supported; must be {' or '.join(repr(a) for a in allowed)}"
            )

    def size(name: str, default: int) -> int:
        value = raw.get(name, default)
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name}={value!r} must be a whole number of at least 1")
        return value

    n_embd = size("n_embd", 768)
    need("model_type", None, "gpt2")
    need("activation_function", "gelu_new", *ACTIVATIONS)
    need("n_inner", None, None, 4 * n_embd)
    need("layer_norm_epsilon", NORM_EPSILON, NORM_EPSILON)
    need("scale_attn_weights", True, True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        need(name, False, False)
    need("tie_word_embeddings", True, True, False)
    dropouts = {raw.get(name, 0.1) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    dropout = dropouts.pop() if len(dropouts) == 1 else 0.0
    try:
        return ModelConfig(
            n_layer=size("n_layer", 12),
            n_head=size("n_head", 12),
            n_embd=n_embd,
            block_size=size("n_positions", 1024),
            vocab_size=size("vocab_size", 50257),
            dropout=float(dropout),
            tied_embeddings=raw.get("tie_word_embeddings", True),
        )
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None


def _hf_config(model: ModelConfig, end_of_text: int | None) -> dict:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_ctx": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "n_inner": None,
        "activation_function": ACTIVATIONS[0],
        "layer_norm_epsilon": NORM_EPSILON,
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }


def _check_exportable(model: ModelConfig) -> None:
    if model.kv_heads != model.n_head:
        raise UserError(
            f"model.n_kv_head={model.n_kv_head}: GPT-2 has as many key heads as query heads ({model.n_head});"
            " this model cannot be exported as one"
        )
    if not model.bias:
        raise UserError("model.bias=False: GPT-2 has biases; this model cannot be exported as one")
    if model.attention_window:
        raise UserError(
            f"model.attention_window={model.attention_window}: GPT-2 attends to all earlier tokens; this model cannot"
            " be exported as one"
        )


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in a GPT-2 file, without prefix."""
    D, V = model.n_embd, model.vocab_size
    block = {
        **dict.fromkeys(("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"), (D,)),
        **{"attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,)},
        **{"attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,)},
        **{"mlp.c_fc.weight": (D, 4 * D), "mlp.c_fc.bias": (4 * D,)},
        **{"mlp.c_proj.weight": (4 * D, D), "mlp.c_proj.bias": (D,)},
    }
    outer = {"wte.weight": (V, D), "wpe.weight": (model.block_size, D), "ln_f.weight": (D,), "ln_f.bias": (D,)}
    head = {} if model.tied_embeddings else {HEAD: (V, D)}
    return outer | head | {f"h.{i}.{name}": shape for i in range(model.n_layer) for name, shape in block.items()}


def _file_names(model: ModelConfig, found: dict[str, tuple[int, ...]], hf_dir: Path) -> dict[str, str]:
    """Maps each tensor's name to its name in the file, which may have a prefix; checks that the file holds a GPT-2."""
    expected = _shapes(model)
    names = {name.removeprefix(PREFIX): name for name in found}
    for name, shape in expected.items():
        if name not in names:
            raise UserError(f"{hf_dir}: tensor {name} {list(shape)} is missing from {WEIGHTS}")
        if found[names[name]] != shape:
            raise UserError(
                f"{hf_dir}: tensor {name} has shape {list(found[names[name]])}, config.json says {list(shape)}"
            )
    ignored = {f"h.{i}.{buffer}" for i in range(model.n_layer) for buffer in BUFFERS} | {HEAD}
    if unknown := sorted(set(names) - set(expected) - ignored):
        raise UserError(f"{hf_dir}: tensor {names[unknown[0]]} is not part of a GPT-2 with {model.n_layer} layers")
    return names


def _params(model: ModelConfig, read: Callable[[str], np.ndarray]) -> dict:
    params: dict = {"embed": {}, "norm_f": {}, "blocks": {"norm_1": {}, "attn": {}, "norm_2": {}, "mlp": {}}}
    for (part, leaf), name in OUTER.items():
        params[part][leaf] = jnp.asarray(read(name))
    for (part, leaf), name in BLOCK.items():
        layers = [_to_ours(model, (part, leaf), read(f"h.{i}.{name}")) for i in range(model.n_layer)]
        params["blocks"][part][leaf] = jnp.asarray(np.stack(layers))
    if not model.tied_embeddings:
        params["head"] = {"w": jnp.asarray(read(HEAD))}
    return params


def _tensors(model: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), params)
    params["embed"]["tokens"] = params["embed"]["tokens"][: model.vocab_size]
    tensors = {PREFIX + name: params[part][leaf] for (part, leaf), name in OUTER.items()}
    for (part, leaf), name in BLOCK.items():
        for i, layer in enumerate(params["blocks"][part][leaf]):
            tensors[f"{PREFIX}h.{i}.{name}"] = _to_theirs((part, leaf), layer)
    if not model.tied_embeddings:
        tensors[HEAD] = params["head"]["w"][: model.vocab_size]
    return tensors


def _to_ours(model: ModelConfig, leaf: tuple[str, str], x: np.ndarray) -> np.ndarray:
    """Lays out one layer's tensor as we do. Conv1D keeps weights as `[in, out]`."""
    match leaf:
        case ("attn", "w_qkv" | "b_qkv"):  # [..., 3 D], all queries, then all keys, then all values → [..., H, E, C]
            return np.swapaxes(x.reshape(*x.shape[:-1], 3, model.n_head, model.head_width), -3, -2)
        case ("mlp", "w_out"):
            return x.T
    return x


def _to_theirs(leaf: tuple[str, str], x: np.ndarray) -> np.ndarray:
    """Undoes `_to_ours`."""
    match leaf:
        case ("attn", "w_qkv" | "b_qkv"):
            return np.swapaxes(x, -3, -2).reshape(*x.shape[:-3], -1)
        case ("mlp", "w_out"):
            return x.T
    return x
