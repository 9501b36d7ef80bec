"""GPT-2: learned positions, layer norms and biases everywhere."""

from gptjax.config.model import ModelConfig
from gptjax.exchange.families.family import Family, conv1d_qkv, same, transposed
from gptjax.exchange.families.fields import Fields

OUTER = (
    same("embed/tokens", "wte.weight"),
    same("embed/positions", "wpe.weight"),
    same("norm_f/scale", "ln_f.weight"),
    same("norm_f/bias", "ln_f.bias"),
)
BLOCK = (
    same("norm_1/scale", "ln_1.weight"),
    same("norm_1/bias", "ln_1.bias"),
    conv1d_qkv("attn/w_qkv", "attn.c_attn.weight"),
    conv1d_qkv("attn/b_qkv", "attn.c_attn.bias"),
    same("attn/w_out", "attn.c_proj.weight"),
    same("attn/b_out", "attn.c_proj.bias"),
    same("norm_2/scale", "ln_2.weight"),
    same("norm_2/bias", "ln_2.bias"),
    same("mlp/w_in", "mlp.c_fc.weight"),
    same("mlp/b_in", "mlp.c_fc.bias"),
    transposed("mlp/w_out", "mlp.c_proj.weight"),  # ours is stored [D, F]
    same("mlp/b_out", "mlp.c_proj.bias"),
)
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
ACTIVATION_NAMES = {"gelu": "gelu_new", "gelu_exact": "gelu"}
SUMMARY = ("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout")
"""Tensors of a head with two outputs, which is ignored."""


def read_sizes(fields: Fields) -> dict:
    """Reads sizes and dropout rates, whose fields are the same in GPT-1 and GPT-2."""
    for name in SUMMARY:
        fields.get(name, None)
    fields.get("n_ctx", None)
    rates = {fields.number(name, 0.1) for name in DROPOUTS}
    return {
        "n_layer": fields.size("n_layer", 12),
        "n_head": fields.size("n_head", 12),
        "n_embd": fields.size("n_embd", 768),
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-5),
        "dropout": rates.pop() if len(rates) == 1 else 0.0,
        "tied_embeddings": fields.flag("tie_word_embeddings", True),
    }


def write_sizes(model: ModelConfig) -> dict:
    """Inverse of `read_sizes`."""
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.block_size,
        "n_embd": model.n_embd,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "layer_norm_epsilon": model.norm_epsilon,
        **dict.fromkeys(DROPOUTS, model.dropout),
        "tie_word_embeddings": model.tied_embeddings,
    }


def _read_gpt2(fields: Fields) -> ModelConfig:
    fields.need("scale_attn_weights", True, True)
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        fields.need(name, False, False)
    return ModelConfig(
        **read_sizes(fields),
        mlp_width=fields.optional_size("n_inner", None),
        block_size=fields.size("n_positions", 1024),
        vocab_size=fields.size("vocab_size", 50257),
        activation=fields.activation("activation_function", "gelu_new"),
    )


def _write_gpt2(model: ModelConfig) -> dict:
    return {
        **write_sizes(model),
        "n_ctx": model.block_size,
        "n_inner": None if model.mlp_size == 4 * model.n_embd else model.mlp_size,
        "activation_function": ACTIVATION_NAMES.get(model.activation, model.activation),
        "scale_attn_weights": True,
    }


GPT2 = Family(
    *("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, OUTER, BLOCK),
    **{"prefix": "transformer.", "layer": "h.{}.", "buffers": ("attn.bias", "attn.masked_bias")},
    tag_head="classifier",
    conv1d=True,
)
