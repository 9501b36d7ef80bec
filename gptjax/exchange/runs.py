"""Run directories ⇄ model folders of other programs."""

from collections.abc import Callable
from pathlib import Path

from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.config.run import Config, TokenizerConfig
from gptjax.config.verbs import ExportConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.hf_model import export_model, import_model
from gptjax.exchange.hf_tokenizer import configured_end_ids
from gptjax.model.adapters import merge_lora
from gptjax.text.tokenizer import Tokenizer, make_tokenizer


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
    imported = import_model(hf_dir, (lambda message: None) if tokenizer_name else notify)
    tokenizer, described = imported.tokenizer, TokenizerConfig()
    if tokenizer_name:
        described = TokenizerConfig(kind="tiktoken", name=tokenizer_name)
        tokenizer = make_tokenizer(described, lambda: [])
        if tokenizer.vocab_size > imported.model.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_name} has {tokenizer.vocab_size:,} tokens, the model in {hf_dir} knows"
                f" {imported.model.vocab_size:,}"
            )
        ends = configured_end_ids(hf_dir)
        if ends and tokenizer.end_of_text not in ends:
            notify(
                f"{hf_dir}: its config names {ends} as end tokens, tokenizer {tokenizer_name} has"
                f" {tokenizer.end_of_text}; sampling stops at the latter"
            )
    elif tokenizer is not None:
        described = _description(tokenizer)
    config = Config(run_dir=str(run_dir), model=imported.model, tokenizer=described)
    write_run(run_dir, config, imported.params, tokenizer)
    return config


def export_run(run_dir: Path, options: ExportConfig, notify: Callable[[str], None] = lambda message: None) -> None:
    """Writes a run's model and tokenizer as a Hugging Face model folder.

    Args:
        run_dir: The run.
        options: The folder to make (an empty one will do), the checkpoint, the family of models, and whether to merge
            an adapter.
        notify: Told in one line what is left out (heads, a tokenizer that has no form that transformers reads), and of
            damaged checkpoints.

    Raises:
        UserError: No run or no checkpoint there, no family computes the same, an adapter cannot be merged or is not
            asked to be, or the folder holds files.
    """
    if options.family and options.family not in FAMILIES:
        suggestion = did_you_mean(options.family, FAMILIES)
        raise UserError(f"family={options.family!r} must be one of {', '.join(FAMILIES)}.{suggestion}")
    run = load_run(run_dir, options.checkpoint, options.strict, notify, options.base)
    model, params = run.config.model, run.params
    kind = model.adapter.kind
    if options.merge and kind != "lora":
        raise UserError(f"{run_dir}: merge needs a lora adapter, this run has model.adapter.kind={kind}")
    if not options.merge and kind == "lora":
        raise UserError(f"{run_dir}: has a lora adapter, which the format cannot hold; add --merge")
    if kind not in ("none", "lora"):
        raise UserError(f"{run_dir}: has a {kind} adapter, which the format cannot hold")
    if options.merge:
        model, params = merge_lora(model, params)
    if heads := params.get("heads"):
        notify(f"the head {', '.join(heads)} is left out: the folder holds the model under it")
        params = {name: part for name, part in params.items() if name != "heads"}
    to, shard_bytes = Path(options.to).expanduser(), options.max_shard_mb * 2**20
    export_model(model, params, run.tokenizer, to, notify, options.family, shard_bytes)


def _description(tokenizer: Tokenizer) -> TokenizerConfig:
    """The config that names an imported tokenizer; the run's tokenizer.json is what defines it."""
    if tokenizer.kind == "tiktoken":
        return TokenizerConfig(kind="tiktoken", name="gpt2")
    return TokenizerConfig(kind="bpe", vocab_size=tokenizer.vocab_size)
