"""A small GPT-2 of `transformers`, and the same model imported: tests that compare with that library share them."""

import functools
import tempfile
from pathlib import Path

import pytest

VOCAB_SIZE = 37


@functools.cache
def hf_model():
    """A GPT-2 of `transformers` whose logits are spread widely; skips the test where the library is missing."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        **{"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "vocab_size": VOCAB_SIZE},
        **{"initializer_range": 0.4, "bos_token_id": None, "eos_token_id": None},
    )
    return transformers.GPT2LMHeadModel(config).eval()


@functools.cache
def our_model():
    """Config and parameters of `hf_model`, imported."""
    from gptjax.checkpoints.run_dir import load_run
    from gptjax.exchange.runs import import_run

    with tempfile.TemporaryDirectory() as folder:
        hf_model().save_pretrained(f"{folder}/hf")
        import_run(Path(folder, "hf"), Path(folder, "run"))
        run = load_run(Path(folder, "run"))
    return run.config.model, run.params
