"""GPT-NeoX and Pythia: parallel residuals, partial rotary positions, layer norms and biases everywhere."""

from gptjax.config.model import ModelConfig
from gptjax.exchange.families.family import Family, interleaved_qkv, same, transposed
from gptjax.exchange.families.fields import ACTIVATION_NAMES, Fields, rope_fields

OUTER = (
    same("embed/tokens", "embed_in.weight"),
    same("norm_f/scale", "final_layer_norm.weight"),
    same("norm_f/bias", "final_layer_norm.bias"),
)
BLOCK = (
    same("norm_1/scale", "input_layernorm.weight"),
    same("norm_1/bias", "input_layernorm.bias"),
    interleaved_qkv("attn/w_qkv", "attention.query_key_value.weight"),
    interleaved_qkv("attn/b_qkv", "attention.query_key_value.bias"),
    transposed("attn/w_out", "attention.dense.weight"),
    same("attn/b_out", "attention.dense.bias"),
    same("norm_2/scale", "post_attention_layernorm.weight"),
    same("norm_2/bias", "post_attention_layernorm.bias"),
    transposed("mlp/w_in", "mlp.dense_h_to_4h.weight"),
    same("mlp/b_in", "mlp.dense_h_to_4h.bias"),
    same("mlp/w_out", "mlp.dense_4h_to_h.weight"),  # ours is stored [D, F]
    same("mlp/b_out", "mlp.dense_4h_to_h.bias"),
)


def _read(fields: Fields) -> ModelConfig:
    n_embd, n_head = fields.size("hidden_size", 6144), fields.size("num_attention_heads", 64)
    rates = {fields.number("attention_dropout", 0.0), fields.number("hidden_dropout", 0.0)}
    fields.need("attention_bias", True, True)
    return ModelConfig(
        n_layer=fields.size("num_hidden_layers", 44),
        n_head=n_head,
        n_embd=n_embd,
        mlp_width=fields.size("intermediate_size", 24576),
        block_size=fields.size("max_position_embeddings", 2048),
        vocab_size=fields.size("vocab_size", 50432),
        dropout=rates.pop() if len(rates) == 1 else 0.0,
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        parallel="two_norms" if fields.flag("use_parallel_residual", True) else "none",
        activation=fields.activation("hidden_act", "gelu"),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        **fields.rope(10_000.0, "rotary_emb_base"),
        rope_fraction=fields.rope_fraction(n_embd // n_head, 0.25, "rotary_pct"),
    )


def _write(model: ModelConfig) -> dict:
    return {
        "hidden_size": model.n_embd,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.block_size,
        "vocab_size": model.vocab_size,
        "attention_dropout": model.dropout,
        "hidden_dropout": model.dropout,
        "attention_bias": True,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": model.parallel != "none",
        "hidden_act": ACTIVATION_NAMES.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied_embeddings,
        **rope_fields(model, "rotary_emb_base"),
        "rotary_pct": model.rope_fraction,
    }


GPT_NEOX = Family(
    *("gpt_neox", "GPTNeoXForCausalLM", _read, _write, OUTER, BLOCK),
    prefix="gpt_neox.",
    head="embed_out.weight",
    tag_head="classifier",
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
