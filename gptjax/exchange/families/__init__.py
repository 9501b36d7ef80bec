"""Families of models: how each spells its config.json and its tensors; `FAMILIES` lists them by `model_type`."""

from gptjax.exchange.families import gemma, gpt1, gpt2, gpt_neox, llama

FAMILIES = {
    family.model_type: family for family in (gpt2.GPT2, gpt1.GPT1, gpt_neox.GPT_NEOX, *llama.FAMILIES, *gemma.FAMILIES)
}
"""In the order in which an export without a name tries them."""
