"""Run directories ⇄ model folders of other programs."""

from collections.abc import Callable
from pathlib import Path

from gptjax.checkpoints.run_dir import CHAT_TEMPLATE_FILE, LoadedRun, load_run, write_run
from gptjax.config.run import Config
from gptjax.config.task import CHATS, FinetuneConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.exchange.families import FAMILIES
from gptjax.exchange.gguf_model import export_gguf_model, import_gguf_model
from gptjax.exchange.hf_model import export_model, import_model
from gptjax.exchange.label_models import CLASSES, label_head
from gptjax.exchange.peft import export_lora, import_lora, is_peft
from gptjax.files import write_atomic
from gptjax.model.adapters import merge_lora
from gptjax.tasks.multi import parts_of
from gptjax.text.tokenizer import make_tokenizer
from gptjax.text.tokenizers.base import Tokenizer


def import_run(
    source: Path,
    run_dir: Path,
    tokenizer_name: str = "",
    notify: Callable[[str], None] = lambda message: None,
    base: str = "",
) -> Config:
    """Creates a run directory from another program's model, for sampling or fine-tuning; returns its config.

    Args:
        source: A Hugging Face model folder, a GGUF file, or a PEFT folder with a LoRA adapter.
        run_dir: Folder to create.
        tokenizer_name: Published encoding to use ("gpt2") instead of the model's tokenizer; empty: the model's.
        notify: Receives one line if the run gets no tokenizer.
        base: Run directory of the base model of a PEFT folder.

    Raises:
        UserError: The model is not supported, its files are damaged, the encoding does not fit, or `run_dir` already
            contains a run.
    """
    if run_dir.resolve() == source.resolve():
        raise UserError(f"to={run_dir}: is the folder that is imported; name another one")
    if is_peft(source):
        return _import_adapter(source, run_dir, tokenizer_name, base, notify)
    if base:
        raise UserError(f"base={base} has no effect without a PEFT folder, which {source} is not; leave it out")
    tell = (lambda message: None) if tokenizer_name else notify
    imported = import_gguf_model(source, tell) if source.is_file() else import_model(source, tell)
    tokenizer, described = imported.tokenizer, TokenizerConfig()
    if tokenizer_name:
        described = TokenizerConfig(kind="tiktoken", name=tokenizer_name)
        tokenizer = make_tokenizer(described, lambda: [])
        if tokenizer.vocab_size > imported.model.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_name} has {tokenizer.vocab_size:,} tokens, the model in {source} knows"
                f" {imported.model.vocab_size:,}"
            )
        if imported.end_ids and tokenizer.end_of_text not in imported.end_ids:
            notify(
                f"{source}: its config names {list(imported.end_ids)} as end tokens, tokenizer {tokenizer_name} has"
                f" {tokenizer.end_of_text}; sampling stops at the latter"
            )
    elif tokenizer is not None:
        described = _description(tokenizer)
    config = Config(run_dir=str(run_dir), model=imported.model, tokenizer=described, task=imported.task)
    write_run(run_dir, config, imported.params, tokenizer)
    if imported.chat_template:
        write_atomic(run_dir / CHAT_TEMPLATE_FILE, imported.chat_template.encode())
    return config


def export_run(run_dir: Path, options: ExportConfig, notify: Callable[[str], None] = lambda message: None) -> None:
    """Writes a run's model and tokenizer as a Hugging Face model folder, or as a GGUF file.

    Args:
        run_dir: The run.
        options: The folder or file to create, the checkpoint, the family of models, and whether to merge an adapter.
        notify: Receives one line about parts that are left out (heads, a tokenizer that transformers cannot read), and
            about damaged checkpoints.

    Raises:
        UserError: There is no run or checkpoint, no family is equivalent to the model, an adapter cannot be merged or
            `merge` is not set, or the folder is not empty.
    """
    if options.family and options.family not in FAMILIES:
        suggestion = did_you_mean(options.family, FAMILIES)
        raise UserError(f"family={options.family!r} must be one of {', '.join(FAMILIES)}.{suggestion}")
    run = load_run(run_dir, options.checkpoint, options.strict, notify, options.base, options.average)
    model, params = run.config.model, run.params
    kind = model.adapter.kind
    for asked in ("merge", "adapter"):
        if getattr(options, asked) and kind != "lora":
            raise UserError(f"{run_dir}: {asked} needs a lora adapter, this run has model.adapter.kind={kind}")
    for line in _not_written(run):
        notify(f"{run_dir}: {line}")
    if options.adapter:
        export_lora(model, params, Path(options.to).expanduser(), options.family)
        return
    if not options.merge and kind == "lora":
        raise UserError(
            f"{run_dir}: has a lora adapter, which the format cannot hold; add --merge, or --adapter to write it alone"
        )
    if kind not in ("none", "lora"):
        raise UserError(f"{run_dir}: has a {kind} adapter, which the format cannot hold")
    if options.merge:
        model, params = merge_lora(model, params)
    head = None
    if options.head:
        if run.config.task.kind not in CLASSES:
            raise UserError(f"{run_dir}: has task.kind={run.config.task.kind} and no single head to export")
        head = label_head(run.config.task, params["heads"][run.config.task.kind], str(run_dir))
    elif heads := params.get("heads"):
        notify(f"the head {', '.join(heads)} is left out: what is written is the model under it; --head writes one")
    params = {name: part for name, part in params.items() if name != "heads"}
    to, shard_bytes = Path(options.to).expanduser(), options.max_shard_mb * 2**20
    if options.is_gguf:
        kind = options.gguf_type or "f16"
        export_gguf_model(model, params, run.tokenizer, to, kind, notify, options.family, run.chat_template)
        return
    export_model(model, params, run.tokenizer, to, notify, options.family, shard_bytes, run.chat_template, head)


def _not_written(run: LoadedRun) -> list[str]:
    """What other programs do not know of a run, although it changes how its model is used."""
    lines = []
    if run.config.learned_text and (reason := run.config.why_no_likelihood):
        lines.append(f"other programs read every text from left to right, but {reason}")
    templates = {part.task.template for part in parts_of(run.config).values() if part.task.kind in CHATS}
    if templates and not run.chat_template:
        named = " or ".join(map(repr, sorted(templates)))
        lines.append(f"other programs do not know task.template={named}; write prompts in it")
    return lines


def _import_adapter(
    source: Path, run_dir: Path, tokenizer_name: str, base: str, notify: Callable[[str], None]
) -> Config:
    if not base:
        raise UserError(
            f"{source}: is a PEFT folder, which holds an adapter alone; name the run that it adapts as base"
        )
    if tokenizer_name:
        raise UserError(f"tokenizer={tokenizer_name} has no effect on a PEFT folder: the base has the tokenizer")
    run = load_run(Path(base).expanduser(), notify=notify)
    model, adapters = import_lora(source, run.config.model)
    config = Config(
        run_dir=str(run_dir),
        init_from=base,
        model=model,
        tokenizer=run.config.tokenizer,
        finetune=FinetuneConfig(train="new"),
    )
    write_run(run_dir, config, {"adapters": adapters}, run.tokenizer, run)
    if run.chat_template:
        write_atomic(run_dir / CHAT_TEMPLATE_FILE, run.chat_template.encode())
    return config


def _description(tokenizer: Tokenizer) -> TokenizerConfig:
    """The tokenizer config of an imported run. The run's tokenizer.json defines the tokenizer."""
    if tokenizer.kind == "tiktoken":
        return TokenizerConfig(kind="tiktoken", name="gpt2")
    return TokenizerConfig(kind="bpe", vocab_size=tokenizer.vocab_size)
