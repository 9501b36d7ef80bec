"""Families of models: fields of config.json and names of tensors. `FAMILIES` lists them by `model_type`."""

from gptjax.exchange.families import gemma, gpt1, gpt2, gpt_neox, llama

FAMILIES = {
    family.model_type: family for family in (gpt2.GPT2, gpt1.GPT1, gpt_neox.GPT_NEOX, *llama.FAMILIES, *gemma.FAMILIES)
}
"""An export without a family name tries them in this order."""
