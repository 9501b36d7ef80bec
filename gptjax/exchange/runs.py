"""Run directories ⇄ model folders of other programs."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from gptjax.config import Config, TokenizerConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.exchange.gpt2 import Imported, export_gpt2, import_gpt2
from gptjax.exchange.hf_files import read_config
from gptjax.text.tokenizer import Tokenizer, make_tokenizer
from gptjax.training.checkpoint import load_run, write_run


class Architecture(NamedTuple):
    """How one kind of model is read and written."""

    import_model: Callable[..., Imported]
    export_model: Callable[..., None]


# By the model_type of config.json: another architecture is a file beside gpt2.py and a line here.
ARCHITECTURES = {"gpt2": Architecture(import_gpt2, export_gpt2)}


def import_run(
    hf_dir: Path, run_dir: Path, tokenizer_name: str = "", notify: Callable[[str], None] = lambda message: None
) -> Config:
    """Makes a run directory of a Hugging Face model folder, to sample from or to start from; returns its config.

    Args:
        hf_dir: The model folder.
        run_dir: Folder to make.
        tokenizer_name: Published encoding to use ("gpt2") instead of the folder's tokenizer; empty: the folder's.
        notify: Told in one line where the run gets no tokenizer.

    Raises:
        UserError: The model is of a kind that is not supported, its files are wrong, the encoding does not fit, or
            `run_dir` holds a run already.
    """
    model_type = read_config(hf_dir).get("model_type")
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"{hf_dir}: model_type={model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}."
            f"{did_you_mean(str(model_type), ARCHITECTURES)}"
        )
    imported = ARCHITECTURES[model_type].import_model(hf_dir, (lambda message: None) if tokenizer_name else notify)
    tokenizer, described = imported.tokenizer, TokenizerConfig()
    if tokenizer_name:
        described = TokenizerConfig(kind="tiktoken", name=tokenizer_name)
        tokenizer = make_tokenizer(described, lambda: [])
        if tokenizer.vocab_size > imported.model.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_name} has {tokenizer.vocab_size:,} tokens, the model in {hf_dir} knows"
                f" {imported.model.vocab_size:,}"
            )
    elif tokenizer is not None:
        described = _description(tokenizer)
    config = Config(run_dir=str(run_dir), model=imported.model, tokenizer=described)
    write_run(run_dir, config, imported.params, tokenizer)
    return config


def export_run(
    run_dir: Path,
    hf_dir: Path,
    which: Literal["best", "latest"] = "best",
    strict: bool = False,
    notify: Callable[[str], None] = lambda message: None,
) -> None:
    """Writes a run's model and tokenizer as a Hugging Face GPT-2 folder.

    Args:
        run_dir: The run.
        hf_dir: Folder to make; an empty one will do.
        which: The checkpoint with the lowest validation loss, or the newest.
        strict: Refuse where that checkpoint is damaged, instead of using another.
        notify: Told in one line where the tokenizer has no form that transformers reads, or a checkpoint is damaged.

    Raises:
        UserError: No run or no checkpoint there, the model is not a GPT-2, or `hf_dir` holds files.
    """
    run = load_run(run_dir, which, strict, notify)
    ARCHITECTURES["gpt2"].export_model(run.config.model, run.params, run.tokenizer, hf_dir, notify)


def _description(tokenizer: Tokenizer) -> TokenizerConfig:
    """The config that names an imported tokenizer; the run's tokenizer.json is what defines it."""
    if tokenizer.kind == "tiktoken":
        return TokenizerConfig(kind="tiktoken", name="gpt2")
    return TokenizerConfig(kind="bpe", vocab_size=tokenizer.vocab_size)
