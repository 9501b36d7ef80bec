"""Llama and similar families: RMSNorm, rotary embeddings, gated MLPs, biases only in queries, keys and values."""

from collections.abc import Callable

from gptjax.config.model import ModelConfig
from gptjax.errors import UserError
from gptjax.exchange.families.family import (
    Entry,
    Family,
    gate_and_up,
    same,
    separate_qkv,
    shortest_pattern,
    stacked_qkv,
    transposed,
)
from gptjax.exchange.families.fields import ACTIVATION_NAMES, Fields, rope_fields

WEIGHTS = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
OUTER = (same("embed/tokens", "embed_tokens.weight"), same("norm_f/scale", "norm.weight"))
NORMS = (same("norm_1/scale", "input_layernorm.weight"), same("norm_2/scale", "post_attention_layernorm.weight"))
QKV = (separate_qkv("attn/w_qkv", *WEIGHTS), separate_qkv("attn/b_qkv", *BIASES))
QK_NORM = (same("attn/norm_q/scale", "self_attn.q_norm.weight"), same("attn/norm_k/scale", "self_attn.k_norm.weight"))
ATTENTION = (*QKV, *QK_NORM, transposed("attn/w_out", "self_attn.o_proj.weight"))
MLP = (
    transposed("mlp/w_in", "mlp.up_proj.weight"),
    transposed("mlp/w_gate", "mlp.gate_proj.weight"),
    same("mlp/w_out", "mlp.down_proj.weight"),  # ours is stored [D, F]
)
BUFFERS = ("self_attn.rotary_emb.inv_freq",)


def read_common(
    fields: Fields, defaults: dict, activation: str = "hidden_act", bias_fields: tuple[str, ...] = ("attention_bias",)
) -> dict:
    """Reads the options that all these families share.

    Args:
        fields: The config.json.
        defaults: The family's defaults in transformers.
        activation: Name of the field with the activation.
        bias_fields: Fields that add single biases. The decoder supports only all biases together, so they must be off.
    """
    n_embd = fields.size("hidden_size", defaults["hidden_size"])
    n_head = fields.size("num_attention_heads", defaults["num_attention_heads"])
    n_kv_head = fields.optional_size("num_key_value_heads", defaults.get("num_key_value_heads"))
    for name in bias_fields:
        fields.need(name, False, False)
    fields.get("attention_dropout", 0.0)
    return {
        "n_layer": fields.size("num_hidden_layers", defaults["num_hidden_layers"]),
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "n_embd": n_embd,
        "mlp_width": fields.size("intermediate_size", defaults["intermediate_size"]),
        "block_size": fields.size("max_position_embeddings", defaults["max_position_embeddings"]),
        "vocab_size": fields.size("vocab_size", defaults["vocab_size"]),
        "norm": "rms",
        "norm_epsilon": fields.number("rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
        "activation": fields.activation(activation, defaults.get("hidden_act", "silu")),
        "gated": True,
        "bias": False,
        "tied_embeddings": fields.flag("tie_word_embeddings", defaults.get("tie_word_embeddings", False)),
    }


def write_common(model: ModelConfig, activation: str = "hidden_act") -> dict:
    """Inverse of `read_common`."""
    return {
        "hidden_size": model.n_embd,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.block_size,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        activation: ACTIVATION_NAMES.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied_embeddings,
        "attention_dropout": model.dropout,
    }


def read_window(fields: Fields, kinds: tuple[str, ...], window: int, block_size: int, local_base: float = 0.0) -> dict:
    """Attention options for layers of the given kinds. A window of at least `block_size` is the same as no window.

    Args:
        fields: The config.json, for error messages.
        kinds: Kind of each layer.
        window: Window of local layers.
        block_size: Largest context length.
        local_base: Base frequency of rope in local layers, if it differs.
    """
    local = {kind for kind in kinds if kind.startswith("local")}
    if not local or not window or (window >= block_size and not local_base):
        kinds = tuple(kind.replace("local", "full") for kind in kinds)
        return {} if set(kinds) == {"full"} else {"attention_pattern": shortest_pattern(kinds)}
    if window >= block_size:
        rule = f"must be less than max_position_embeddings={block_size} where sliding layers have a rope of their own"
        raise fields.refusal("sliding_window", window, rule)
    if set(kinds) == {"local"} and not local_base:
        return {"attention_window": window}
    return {"attention_window": window, "attention_pattern": shortest_pattern(kinds)}


def layer_types(model: ModelConfig) -> list[str]:
    """The kind of each layer, in transformers' terms."""
    local = (model.layer_kind(layer).startswith("local") for layer in range(model.n_layer))
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def own_head_dim(model: ModelConfig) -> dict:
    """`head_dim`, which some families set only if it is not hidden_size / num_attention_heads."""
    return {} if model.head_width * model.n_head == model.n_embd else {"head_dim": model.head_width}


LLAMA_DEFAULTS = {
    **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"max_position_embeddings": 2048, "vocab_size": 32000},
}


def _read_llama(fields: Fields) -> ModelConfig:
    common = read_common(fields, LLAMA_DEFAULTS, bias_fields=("attention_bias", "mlp_bias"))
    return ModelConfig(**common, head_dim=fields.optional_size("head_dim", None), **fields.rope())


def _write_llama(model: ModelConfig) -> dict:
    biases = {"attention_bias": False, "mlp_bias": False}
    return {**write_common(model), "head_dim": model.head_width, **biases, **rope_fields(model)}


MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    **{"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
}


def _read_mistral(fields: Fields) -> ModelConfig:
    common = read_common(fields, MISTRAL_DEFAULTS, bias_fields=())
    window = fields.optional_size("sliding_window", 4096)
    attention = read_window(fields, ("local",), window, common["block_size"])
    return ModelConfig(**common, head_dim=fields.optional_size("head_dim", None), **attention, **fields.rope())


def _write_mistral(model: ModelConfig) -> dict:
    window = None if model.attention_pattern else model.attention_window or None
    return {**write_common(model), "head_dim": model.head_width, "sliding_window": window, **rope_fields(model)}


QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    **{"intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    **{"vocab_size": 151936},
}


def _qwen_window(fields: Fields, common: dict) -> dict:
    window = fields.optional_size("sliding_window", 4096) if fields.flag("use_sliding_window", False) else 0
    first = fields.get("max_window_layers", 28)
    fields.get("sliding_window", None)
    if type(first) is not int:
        raise fields.refusal("max_window_layers", first, "must be a whole number")
    kinds = fields.kinds(
        "layer_types",
        common["n_layer"],
        lambda layer: "sliding_attention" if window and layer >= first else "full_attention",
    )
    return read_window(fields, kinds, window, common["block_size"])


def _write_qwen_window(model: ModelConfig) -> dict:
    return {
        "use_sliding_window": bool(model.attention_window),
        "sliding_window": model.attention_window or None,
        "layer_types": layer_types(model),
    }


def _read_qwen2(fields: Fields) -> ModelConfig:
    common = read_common(fields, QWEN_DEFAULTS, bias_fields=())
    head_dim = fields.optional_size("head_dim", None)
    return ModelConfig(**common, head_dim=head_dim, qkv_bias=True, **_qwen_window(fields, common), **fields.rope())


def _write_qwen2(model: ModelConfig) -> dict:
    return {**write_common(model), **own_head_dim(model), **_write_qwen_window(model), **rope_fields(model)}


def _read_qwen3(fields: Fields) -> ModelConfig:
    common, head_dim = read_common(fields, QWEN_DEFAULTS), fields.size("head_dim", 128)
    return ModelConfig(**common, head_dim=head_dim, qk_norm="head", **_qwen_window(fields, common), **fields.rope())


def _write_qwen3(model: ModelConfig) -> dict:
    return _write_qwen2(model) | {"head_dim": model.head_width, "attention_bias": False}


SMOLLM3_DEFAULTS = LLAMA_DEFAULTS | {
    **{"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4},
    **{"max_position_embeddings": 32768, "vocab_size": 128256, "tie_word_embeddings": True},
}


def _read_smollm3(fields: Fields) -> ModelConfig:
    common = read_common(fields, SMOLLM3_DEFAULTS, bias_fields=("attention_bias", "mlp_bias"))
    count, every = common["n_layer"], fields.size("no_rope_layer_interval", 4)
    rotates = fields.get("no_rope_layers", None) or [int((layer + 1) % every != 0) for layer in range(count)]
    if not isinstance(rotates, list) or len(rotates) != count or not set(rotates) <= {0, 1}:
        raise UserError(f"{fields.where}: no_rope_layers must be a list of {count} ones (layers with rope) and zeros")
    windowed = fields.flag("use_sliding_window", False)
    window = fields.optional_size("sliding_window", None) if windowed else 0
    kinds = fields.kinds(
        "layer_types",
        count,
        lambda layer: "sliding_attention" if window and not rotates[layer] else "full_attention",
    )
    kinds = tuple(
        ("local" if window and kind == "local" else "full") + ("" if rope else "_nope")
        for kind, rope in zip(kinds, rotates, strict=True)
    )
    if "local_nope" in kinds:
        layer = kinds.index("local_nope")
        raise fields.refusal("sliding_window", window, f"layer {layer} has neither full attention nor rope")
    attention = read_window(fields, kinds, window, common["block_size"])
    head_dim = fields.optional_size("head_dim", None)
    return ModelConfig(**common, head_dim=head_dim, **attention, **fields.rope(2_000_000.0))


def _write_smollm3(model: ModelConfig) -> dict:
    rotates = [int(model.layer_kind(layer) != "full_nope") for layer in range(model.n_layer)]
    biases = {"attention_bias": False, "mlp_bias": False, "no_rope_layers": rotates}
    return {**_write_qwen2(model), **biases}


GRANITE_DEFAULTS = LLAMA_DEFAULTS


def _read_granite(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **read_common(fields, GRANITE_DEFAULTS, bias_fields=("attention_bias", "mlp_bias")),
        head_dim=fields.optional_size("head_dim", None),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        attention_scale=fields.number("attention_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0),
        **fields.rope(),
    )


def _write_granite(model: ModelConfig) -> dict:
    return {
        **_write_llama(model),
        "embedding_multiplier": model.embedding_scale,
        "residual_multiplier": model.residual_scale,
        "attention_multiplier": model.attention_scale or model.head_width**-0.5,
        "logits_scaling": 1.0 / model.logit_scale,
    }


OLMO2_DEFAULTS = LLAMA_DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5}
OLMO2_NORMS = (
    same("norm_out_1/scale", "post_attention_layernorm.weight"),
    same("norm_out_2/scale", "post_feedforward_layernorm.weight"),
)


def _read_olmo2(fields: Fields) -> ModelConfig:
    common = read_common(fields, OLMO2_DEFAULTS)
    head_dim = fields.optional_size("head_dim", None)
    return ModelConfig(**common, head_dim=head_dim, norm_position="output", qk_norm="all", **fields.rope())


def _write_olmo2(model: ModelConfig) -> dict:
    return {**write_common(model), **own_head_dim(model), "attention_bias": False, **rope_fields(model)}


PHI3_DEFAULTS = LLAMA_DEFAULTS | {
    **{"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "vocab_size": 32064},
    "rms_norm_eps": 1e-5,
}
PHI3_BLOCK = (
    *NORMS,
    stacked_qkv("attn/w_qkv", "self_attn.qkv_proj.weight"),
    transposed("attn/w_out", "self_attn.o_proj.weight"),
    gate_and_up("mlp/w_gate", "mlp/w_in", "mlp.gate_up_proj.weight"),
    same("mlp/w_out", "mlp.down_proj.weight"),
)


def _read_phi3(fields: Fields) -> ModelConfig:
    common, head_dim = read_common(fields, PHI3_DEFAULTS, bias_fields=()), fields.optional_size("head_dim", None)
    for name in ("resid_pdrop", "embd_pdrop", "original_max_position_embeddings"):
        fields.get(name, None)
    rope = fields.rope()
    if "rope_scaling" in rope or fields.notes:  # transformers reads even yarn as longrope here
        raise fields.refusal("rope_scaling", rope.get("rope_scaling", "dynamic"), "must be null or default")
    fraction = fields.rope_fraction(head_dim or common["n_embd"] // common["n_head"], 1.0)
    window = fields.optional_size("sliding_window", None)
    attention = read_window(fields, ("local",), window, common["block_size"])
    return ModelConfig(**common, head_dim=head_dim, **attention, **rope, rope_fraction=fraction)


def _write_phi3(model: ModelConfig) -> dict:
    return {
        **write_common(model),
        **own_head_dim(model),
        **{"resid_pdrop": model.dropout, "embd_pdrop": model.dropout},
        "sliding_window": None if model.attention_pattern else model.attention_window or None,
        **{"rope_theta": model.rope_base, "rope_scaling": None, "partial_rotary_factor": model.rope_fraction},
        "original_max_position_embeddings": model.block_size,
    }


BLOCK = (*NORMS, *ATTENTION, *MLP)


def _relative(
    model_type: str,
    architecture: str,
    read: Callable[[Fields], ModelConfig],
    write: Callable[[ModelConfig], dict],
    block: tuple[Entry, ...] = BLOCK,
    label_heads: tuple[str, ...] = ("classify", "tag"),
) -> Family:
    return Family(model_type, architecture, read, write, OUTER, block, buffers=BUFFERS, label_heads=label_heads)


FAMILIES = (
    _relative("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    _relative("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
    _relative("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    _relative("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    _relative("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3),
    _relative("granite", "GraniteForCausalLM", _read_granite, _write_granite, label_heads=()),
    _relative(
        *("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_olmo2),
        block=(*OLMO2_NORMS, *ATTENTION, *MLP),
        label_heads=("classify",),
    ),
    _relative("phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, PHI3_BLOCK),
)
