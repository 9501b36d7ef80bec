"""The peers of bench/ compute what `transformers` does, and gptjax's side of a row has the same parameters."""

import sys
from pathlib import Path

import jax
import pytest

from gptjax.config.model import ModelConfig
from gptjax.model.gpt import init_params

torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("transformers", reason="needs transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from ours import modern_options  # noqa: E402
from peer import make_llama, make_model  # noqa: E402
from plain_torch import Decoder  # noqa: E402
from run import choose, rows  # noqa: E402
from work import Training  # noqa: E402

LLAMA = [f"self_attn.{kind}_proj" for kind in "qkvo"] + [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


@pytest.mark.parametrize("modern", [False, True], ids=["gpt2", "llama"])
def test_the_plain_model_is_that_of_transformers(modern):
    work = Training(2, 4, 64, 32, 2, 97, modern=modern, n_kv_head=2 if modern else 0)
    theirs = (make_llama(work) if modern else make_model(work)).eval()
    plain, state = Decoder(work), theirs.state_dict()
    with torch.no_grad():
        plain.tokens.weight.copy_(state["model.embed_tokens.weight" if modern else "transformer.wte.weight"])
        if plain.places is not None:
            plain.places.weight.copy_(state["transformer.wpe.weight"])
        for number, block in enumerate(plain.blocks):
            if modern:
                layer = {name: state[f"model.layers.{number}.{name}.weight"] for name in LLAMA}
                block.qkv.weight.copy_(torch.cat([layer[f"self_attn.{kind}_proj"] for kind in "qkv"]))
                block.out.weight.copy_(layer["self_attn.o_proj"])
                block.up.weight.copy_(torch.cat([layer["mlp.gate_proj"], layer["mlp.up_proj"]]))
                block.down.weight.copy_(layer["mlp.down_proj"])
            else:
                pairs = (block.qkv, "attn.c_attn"), (block.out, "attn.c_proj"), (block.up, "mlp.c_fc")
                for linear, name in (*pairs, (block.down, "mlp.c_proj")):
                    linear.weight.copy_(state[f"transformer.h.{number}.{name}.weight"].T)
                    linear.bias.copy_(state[f"transformer.h.{number}.{name}.bias"])
    ids = torch.randint(0, 97, (2, 32))
    torch.testing.assert_close(plain(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=0)  # float32 rounding

    options = modern_options(work) | {"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 97}
    ours = jax.eval_shape(lambda: init_params(ModelConfig(**options), jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == sum(p.numel() for p in plain.parameters())


def test_a_full_name_chooses_one_row_and_a_beginning_several():
    table = rows(on_gpu=False)
    assert list(choose(table, ["medium_bfloat16"])) == ["medium_bfloat16"]
    medium = [f"medium_{dtype}{pages}" for dtype in ("bfloat16", "float32") for pages in ("", "_same_pages")]
    assert list(choose(table, ["medium"])) == medium
    assert choose(table, [""]) == table
