"""Gemma 1 to 3 (text): scaled embeddings, norm scales stored minus 1; Gemma 2 and 3 also have sandwich norms."""

from collections.abc import Mapping

from gptjax.config.model import ModelConfig
from gptjax.exchange.families.family import Family, one_plus, same, transposed
from gptjax.exchange.families.fields import Fields, rope_fields
from gptjax.exchange.families.llama import BUFFERS, MLP, QKV, layer_types, read_common, read_window, write_common

OUTER = (same("embed/tokens", "embed_tokens.weight"), one_plus("norm_f/scale", "norm.weight"))
ATTENTION = (*QKV, transposed("attn/w_out", "self_attn.o_proj.weight"))
NORM_1 = one_plus("norm_1/scale", "input_layernorm.weight")
NORMS = (NORM_1, one_plus("norm_2/scale", "post_attention_layernorm.weight"))
SANDWICH = (
    NORM_1,
    one_plus("norm_out_1/scale", "post_attention_layernorm.weight"),
    one_plus("norm_2/scale", "pre_feedforward_layernorm.weight"),
    one_plus("norm_out_2/scale", "post_feedforward_layernorm.weight"),
)
QK_NORM = (
    one_plus("attn/norm_q/scale", "self_attn.q_norm.weight"),
    one_plus("attn/norm_k/scale", "self_attn.k_norm.weight"),
)
DEFAULTS = {
    **{"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "max_position_embeddings": 8192, "vocab_size": 256000, "tie_word_embeddings": True},
    "hidden_act": "gelu_pytorch_tanh",
}
DEFAULTS_2 = DEFAULTS | {
    **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8},
    "num_key_value_heads": 4,
}
DEFAULTS_3 = DEFAULTS_2 | {"max_position_embeddings": 131_072, "vocab_size": 262_208}


def _read_gemma(fields: Fields) -> ModelConfig:
    common = read_common(fields, DEFAULTS) | {"activation": "gelu"}
    # In older files "gelu" means the tanh approximation.
    fields.need("hidden_act", "gelu_pytorch_tanh", "gelu", "gelu_pytorch_tanh", "gelu_new")
    fields.need("hidden_activation", None, None, "gelu_pytorch_tanh")
    _check_causal(fields)
    head_dim, scale = fields.size("head_dim", 256), _embedding_scale(common)
    return ModelConfig(**common, head_dim=head_dim, embedding_scale=scale, **fields.rope())


def _write_gemma(model: ModelConfig) -> dict:
    head = {"head_dim": model.head_width, "attention_bias": False}
    return {**write_common(model), **head, "hidden_act": "gelu_pytorch_tanh", **rope_fields(model)}


def _read_gemma2(fields: Fields) -> ModelConfig:
    common = read_common(fields, DEFAULTS_2, "hidden_activation")
    caps = {"attention_softcap": ("attn_logit_softcapping", 50.0), "logit_softcap": ("final_logit_softcapping", 30.0)}
    return ModelConfig(
        **common,
        **_read_sandwich(fields, common, caps),
        **read_window(fields, *_kinds(fields, common, 4096, 2), common["block_size"]),
        **fields.rope(),
    )


def _write_gemma2(model: ModelConfig) -> dict:
    caps = {"attn_logit_softcapping": model.attention_softcap or None}
    return {**_write_sandwich(model), **caps, **rope_fields(model)}


def _read_gemma3(fields: Fields) -> ModelConfig:
    common = read_common(fields, DEFAULTS_3, "hidden_activation")
    fields.need("attn_logit_softcapping", None, None)  # transformers does not use it
    caps = {"logit_softcap": ("final_logit_softcapping", None)}
    fields.get("_sliding_window_pattern", None)  # written by transformers 5, which does not read it
    kinds, window = _kinds(fields, common, 4096, fields.size("sliding_window_pattern", 6))
    local = fields.rope(10_000.0, "rope_local_base_freq", "sliding_attention")
    if "rope_scaling" in local:
        name = "rope_parameters.sliding_attention.rope_type"
        raise fields.refusal(name, local["rope_scaling"], "must be default")
    rope = fields.rope(1_000_000.0, "rope_theta", "full_attention")
    own = local["rope_base"] if "rope_scaling" in rope or local["rope_base"] != rope["rope_base"] else 0.0
    attention = read_window(fields, kinds, window, common["block_size"], own)
    if "attention_pattern" in attention and own:
        attention["rope_local_base"] = own
    return ModelConfig(**common, **_read_sandwich(fields, common, caps), **attention, **rope, qk_norm="head")


def _write_gemma3(model: ModelConfig) -> dict:
    local = {"rope_local_base_freq": model.rope_local_base or model.rope_base}
    return {**_write_sandwich(model), **rope_fields(model), **local}


def _kinds(fields: Fields, common: dict, window: int, every: int) -> tuple[tuple[str, ...], int]:
    kinds = fields.kinds(
        "layer_types",
        common["n_layer"],
        lambda layer: "sliding_attention" if (layer + 1) % every else "full_attention",
    )
    return kinds, fields.optional_size("sliding_window", window)


def _read_sandwich(fields: Fields, common: dict, caps: Mapping[str, tuple[str, float | None]]) -> dict:
    _check_causal(fields)
    return {
        "norm_position": "sandwich",
        "head_dim": fields.size("head_dim", 256),
        "attention_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": _embedding_scale(common),
        **{option: fields.optional_number(*field) for option, field in caps.items()},
    }


def _write_sandwich(model: ModelConfig) -> dict:
    scale = model.attention_scale or model.head_width**-0.5
    return {
        **write_common(model, "hidden_activation"),
        "head_dim": model.head_width,
        "attention_bias": False,
        "query_pre_attn_scalar": max(1, round(scale**-2)),  # transformers expects an integer
        "final_logit_softcapping": model.logit_softcap or None,
        "sliding_window": model.attention_window or model.block_size,
        "layer_types": layer_types(model),
    }


def _embedding_scale(common: dict) -> float:
    return common["n_embd"] ** 0.5


def _check_causal(fields: Fields) -> None:
    fields.need("use_bidirectional_attention", False, False, None)


FAMILIES = (
    Family(
        *("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, OUTER, (*NORMS, *ATTENTION, *MLP)),
        buffers=BUFFERS,
    ),
    Family(
        *("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, OUTER, (*SANDWICH, *ATTENTION, *MLP)),
        buffers=BUFFERS,
    ),
    Family(
        *("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _write_gemma3, OUTER),
        (*SANDWICH, *QK_NORM, *ATTENTION, *MLP),
        buffers=BUFFERS,
        label_heads=(),
    ),
)
