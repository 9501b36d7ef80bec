"""A GGUF file ⇄ config and parameters, through the names and fields of the same model at Hugging Face.

In the `llama` architecture, llama.cpp pairs adjacent channels of a head for rotary embeddings, and Hugging Face pairs
channels of the two halves. So the rows of queries and keys have a different order in a GGUF file.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.model import ModelConfig
from gptjax.errors import UserError, did_you_mean, readable_values
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.families.family import Family, choose_family
from gptjax.exchange.families.gpt2 import DROPOUTS
from gptjax.exchange.gguf_file import GgufFile, import_gguf, open_gguf
from gptjax.exchange.gguf_tokenizer import gguf_tokenizer_files, write_tokenizer
from gptjax.exchange.hf_model import Imported, read_model_config, read_params, tensor_shapes, tensors_of
from gptjax.exchange.hf_tokenizer import import_tokenizer
from gptjax.text.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp."""

    name: str
    model_type: str
    """`model_type` of the family at Hugging Face."""
    neighbours: bool = False
    """Whether rotary embeddings pair adjacent channels."""
    norms_above_one: bool = False
    """Whether the file holds the scale of norms, and Hugging Face only what exceeds one."""
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """More fields of config.json and the keys that hold them; a key that is missing is null."""
    fixed: Callable[[dict], dict] = lambda config: {}
    """Fields that llama.cpp derives from the others."""


def _gemma_scale(config: dict) -> dict:
    """Attention of the models of 27 B is scaled by the width of the stream."""
    large = {("gemma2", 46), ("gemma3_text", 62)}
    by_stream = config["hidden_size"] // config["num_attention_heads"]
    is_large = (config["model_type"], config["num_hidden_layers"]) in large
    return {"query_pre_attn_scalar": by_stream if is_large else config["head_dim"]}


WINDOW = {"sliding_window": "attention.sliding_window"}
ARCHITECTURES = {
    "llama": Architecture("LLAMA", "llama", neighbours=True),
    "qwen2": Architecture("QWEN2", "qwen2"),
    "qwen3": Architecture("QWEN3", "qwen3"),
    "gemma": Architecture("GEMMA", "gemma", norms_above_one=True),
    "gemma2": Architecture(
        *("GEMMA2", "gemma2"),
        norms_above_one=True,
        keys=WINDOW
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        fixed=_gemma_scale,
    ),
    "gemma3": Architecture(
        *("GEMMA3", "gemma3_text"),
        norms_above_one=True,
        keys=WINDOW | {"final_logit_softcapping": "final_logit_softcapping"},
        fixed=lambda config: _gemma_scale(config) | {"rope_local_base_freq": 10_000.0},
    ),
    "phi3": Architecture("PHI3", "phi3", keys=WINDOW),
    "olmo2": Architecture("OLMO2", "olmo2"),
    "granite": Architecture(
        *("GRANITE", "granite"),
        neighbours=True,
        keys={
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "attention_multiplier": "attention.scale",
            "logits_scaling": "logit_scale",
        },
    ),
    "gpt2": Architecture(
        *("GPT2", "gpt2"),
        fixed=lambda config: {"activation_function": "gelu_new"} | dict.fromkeys(DROPOUTS, 0.0),
    ),
}
"""Architectures by `general.architecture`."""
SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
"""Fields of config.json and their keys in a GGUF file."""
GPT2_NAMES = {
    **{"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"},
    **{"num_attention_heads": "n_head", "max_position_embeddings": "n_positions"},
}
"""The names of these fields in GPT-2."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE_FACTORS = "rope_freqs.weight"
WITHOUT_EFFECT = ("vocab_size", "rope.dimension_count", "attention.value_length")
"""Redundant keys: their values are checked if they could contradict tensors or other keys."""


def import_gguf_model(path: Path, notify: Callable[[str], None]) -> Imported:
    """Reads a GGUF file of a language model; quantized weights are dequantized to float32.

    Raises:
        UserError: The file is damaged, or the decoder does not support its architecture or one of its options.
    """
    file = open_gguf(path)
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture={name!r} is not supported; supported: {', '.join(ARCHITECTURES)}."
            f"{did_you_mean(str(name), ARCHITECTURES)}"
        )
    with readable_values(str(path)):
        family, model = read_model_config(_hf_config(file, name), str(path), notify)
    theirs = _gguf_names(family, model, name)
    shapes = {
        hf: file.shapes[their][::-1] if _is_conv1d(family, hf) else file.shapes[their]
        for hf, their in theirs.items()
        if their in file.shapes
    }
    if unknown := sorted(file.shapes.keys() - theirs.values() - {ROPE_FACTORS}):
        raise UserError(f"{path}: tensor {unknown[0]} is not part of a {name} model that is supported")
    expected = tensor_shapes(family, model)
    if missing := next((hf_name for hf_name in theirs if hf_name not in shapes), None):
        raise UserError(f"{path}: tensor {theirs[missing]} {list(expected[missing])} is missing")
    to_hf = _tensor_change(family, model, ARCHITECTURES[name], to_file=False)

    def read(hf_name: str) -> np.ndarray:
        return to_hf(hf_name, file.read(theirs[hf_name]))

    params = read_params(family, model, shapes, read, str(path))
    with readable_values(str(path)):
        files = gguf_tokenizer_files(file, notify)
    tokenizer = import_tokenizer(files, model.vocab_size, notify)
    return Imported(model, params, tokenizer, files.chat_template, files.end_ids)


def export_gguf_model(
    model: ModelConfig,
    params: dict,
    tokenizer: Tokenizer | None,
    to: Path,
    kind: str,
    notify: Callable[[str], None],
    family_name: str = "",
    chat_template: str = "",
) -> None:
    """Writes a GGUF file that llama.cpp reads.

    Args:
        model: Shape of the model.
        params: Structure of `init_params`, any float dtype.
        tokenizer: Written if llama.cpp supports its pre-tokenization; None: the file gets no tokenizer.
        to: File to create.
        kind: "f32", "f16" or "q8_0": type of matrices; vectors stay float32.
        notify: Receives one line for each deviation from the request.
        family_name: The architecture; empty: the first equivalent one.
        chat_template: Source of the Jinja chat template, stored in the file.

    Raises:
        UserError: No architecture is equivalent to the model, or the file exists.
    """
    gguf = import_gguf()
    names = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
    if family_name and family_name not in names:
        raise UserError(f"family={family_name!r} must be one of {', '.join(names)} for a GGUF file")
    if to.exists():
        raise UserError(f"{to}: exists already; name another file")
    family = FAMILIES[
        choose_family({name: _as_in_a_file(names[name]) for name in names}, model, family_name).model_type
    ]
    name, partial = names[family.model_type], to.with_name(f"{to.name}.partial")
    types = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16}
    writer = gguf.GGUFWriter(partial, name)
    writer.add_file_type(types.get(kind, gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    factors = _write_config(gguf, writer, name, family.write(model), model, str(to))
    if tokenizer is not None:
        write_tokenizer(gguf, writer, tokenizer, model.vocab_size, str(to), notify)
    if chat_template:
        writer.add_chat_template(chat_template)
    if factors is not None:
        writer.add_tensor(ROPE_FACTORS, factors.astype(np.float32))
    unaligned = 0
    for their_name, x in _tensors(family, model, params, name):
        unaligned += _add_tensor(gguf, writer, their_name, x, kind)
    if unaligned:
        notify(f"{to}: {unaligned} matrices are float16, as their rows are no multiple of 32 numbers, as q8_0 needs")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.rename(to)
    except OSError as error:
        raise UserError(f"{to}: cannot be written: {error.strerror}") from None


def _hf_config(file: GgufFile, name: str) -> dict:
    """The config.json of the same model."""
    own = {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    seen: set[str] = set(WITHOUT_EFFECT)

    def get(key: str, default: Any = None) -> Any:
        seen.add(key)
        return own.get(key, default)

    missing = [key for key in SIZES.values() if key not in own]
    if missing or "token_embd.weight" not in file.shapes:
        what = f"key {name}.{missing[0]}" if missing else "tensor token_embd.weight"
        raise UserError(f"{file.where}: {what} is missing")
    architecture = ARCHITECTURES[name]
    config: dict = {"model_type": architecture.model_type} | {field: get(key) for field, key in SIZES.items()}
    heads = config["num_attention_heads"]
    config |= {
        "vocab_size": file.shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }
    if name == "gpt2":
        epsilon = _shortest(get("attention.layer_norm_epsilon", 1e-5))
        get("attention.head_count_kv")  # as many as queries have
        config = {GPT2_NAMES.get(field, field): value for field, value in config.items()}
        return _all_read(file, name, own, seen, config | {"layer_norm_epsilon": epsilon} | architecture.fixed(config))
    config |= {
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon", 1e-6)),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
    }
    for field, key in architecture.keys.items():
        if key in own:
            config[field] = _shortest(value) if isinstance(value := get(key) or None, float) else value
    width = config["hidden_size"] // heads if isinstance(heads, int) and heads else 0
    head_dim = get("attention.key_length", own.get("rope.dimension_count", width))
    config["head_dim"] = head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
        if own.get(key, head_dim) != head_dim:
            raise UserError(
                f"{file.where}: {name}.{key}={own[key]!r} is not supported; must be {head_dim}, as keys are"
            )
    config["rope_scaling"] = _rope_scaling(file, config, get)
    if name == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
    return _all_read(file, name, own, seen, config | architecture.fixed(config))


def _all_read(file: GgufFile, name: str, own: dict, seen: set[str], config: dict) -> dict:
    """The config, if it depends on all keys of the file's architecture."""
    if unread := [key for key in own if key not in seen and own[key] not in (0, False, "", "none")]:
        raise UserError(f"{file.where}: {name}.{unread[0]}={str(own[unread[0]])[:40]} is not supported")
    return config


def _rope_scaling(file: GgufFile, config: dict, get: Callable) -> dict | None:
    kind, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", get("rope.scale_linear", 1.0))
    length = get("rope.scaling.original_context_length", 0)
    if ROPE_FACTORS in file.shapes:
        found = file.read(ROPE_FACTORS)
        scaling = {"factor": float(found.max()), "original_max_position_embeddings": length or 8192, **LLAMA3}
        expected = _llama3_factors(config["rope_theta"], config["head_dim"], scaling)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            raise UserError(f"{file.where}: tensor {ROPE_FACTORS} is not supported; must be the factors of Llama 3")
        return {"rope_type": "llama3"} | scaling
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor} | (
            {"original_max_position_embeddings": length} if length else {}
        )
    if kind not in ("none", "linear"):
        raise UserError(f"{file.where}: rope.scaling.type={kind!r} is not supported; must be none, linear or yarn")
    return {"rope_type": "linear", "factor": factor} if factor != 1.0 and (kind == "linear" or factor > 0) else None


def _as_in_a_file(name: str) -> Family:
    """A family whose config.json is what a GGUF file of the architecture holds of it, to find what is lost."""
    architecture = ARCHITECTURES[name]
    family = FAMILIES[architecture.model_type]
    common = {"num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "head_dim", "layer_norm_epsilon"}
    kept = SIZES.keys() | set(GPT2_NAMES.values()) | common | architecture.keys.keys()
    kept |= {"vocab_size", "tie_word_embeddings", "rope_parameters", "original_max_position_embeddings"}

    def write(model: ModelConfig) -> dict:
        config = {"model_type": architecture.model_type} | family.write(model)
        held = {field: value for field, value in config.items() if field in kept}
        held = {field: value for field, value in held.items() if value is not None or field not in architecture.keys}
        return held | architecture.fixed({"head_dim": model.head_width} | config)

    return dataclasses.replace(family, write=write)


def _write_config(gguf: Any, writer: Any, name: str, config: dict, model: ModelConfig, where: str) -> np.ndarray | None:
    """Writes the keys of a config.json; returns the factors of Llama 3's rope scaling if the model uses it."""
    if name == "gpt2":
        for field, key in SIZES.items():
            writer.add_uint32(f"{writer.arch}.{key}", config[GPT2_NAMES[field]] or model.mlp_size)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return None
    for field, key in SIZES.items():
        writer.add_uint32(f"{writer.arch}.{key}", config[field])
    for field, key in ARCHITECTURES[name].keys.items():
        if (value := config[field]) is not None:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{writer.arch}.{key}", value)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(model.head_width)
    writer.add_vocab_size(model.vocab_size)
    scaling = config["rope_scaling"]
    if scaling is None:
        return None
    if "original_max_position_embeddings" in scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if scaling["rope_type"] == "llama3":
        for key, usual in LLAMA3.items():
            if scaling[key] != usual:
                raise UserError(
                    f"{where}: rope scaling llama3 with {key}={scaling[key]} has no form in GGUF; must be {usual}"
                )
        return _llama3_factors(model.rope_base, model.head_width, scaling)
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    return None


def _llama3_factors(base: float, head_dim: int, scaling: dict) -> np.ndarray:
    """The divisor of each frequency, `[head_dim / 2]`; see `ModelConfig.rope_scaling`."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _gguf_names(family: Family, model: ModelConfig, name: str) -> dict[str, str]:
    """Maps names of tensors in a Hugging Face folder to their names in a GGUF file."""
    gguf = import_gguf()
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[name].name], model.n_layer)
    return {hf: table.get_name(hf, (".weight", ".bias")) for hf in tensor_shapes(family, model)}


def _tensors(family: Family, model: ModelConfig, params: dict, name: str) -> Iterator[tuple[str, np.ndarray]]:
    names, change = _gguf_names(family, model, name), _tensor_change(family, model, ARCHITECTURES[name], to_file=True)
    for hf_name, x in tensors_of(family, model, params):
        yield names[hf_name], np.ascontiguousarray(change(hf_name, x))


def _tensor_change(
    family: Family, model: ModelConfig, architecture: Architecture, to_file: bool
) -> Callable[[str, np.ndarray], np.ndarray]:
    """From a tensor of Hugging Face to that of the file, or back."""
    permuted = _permutation(model) if architecture.neighbours else {}

    def change(hf_name: str, x: np.ndarray) -> np.ndarray:
        if (part := hf_name.split(".")[-2]) in permuted:
            return x[permuted[part] if to_file else np.argsort(permuted[part])]
        if architecture.norms_above_one and x.ndim == 1:
            return x + 1.0 if to_file else x - 1.0
        return x.T if _is_conv1d(family, hf_name) else x

    return change


def _is_conv1d(family: Family, hf_name: str) -> bool:
    """Whether a matrix has its inputs first at Hugging Face; in files outputs are first."""
    return family.conv1d and hf_name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def _add_tensor(gguf: Any, writer: Any, name: str, x: np.ndarray, kind: str) -> bool:
    """Adds a tensor; returns whether it is stored as float16 although q8_0 was requested."""
    if x.ndim == 1 or kind == "f32":
        writer.add_tensor(name, x)
        return False
    if kind == "q8_0" and x.shape[-1] % 32 == 0:
        quantized = gguf.quantize(x, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        return False
    writer.add_tensor(name, x.astype(np.float16))
    return kind == "q8_0"


def _permutation(model: ModelConfig) -> dict[str, np.ndarray]:
    """For queries and keys: the row of the Hugging Face tensor for each row of the GGUF tensor."""

    def rows(heads: int) -> np.ndarray:
        return np.arange(heads * model.head_width).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)

    return {"q_proj": rows(model.n_head), "k_proj": rows(model.kv_heads)}


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to a float32 of the file: 1e-5 for 0.00000999999974737875."""
    return float(str(np.float32(value)))
