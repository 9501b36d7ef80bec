"""`gptjax prepare`."""

from pathlib import Path

from gptjax.config.start import Start
from gptjax.errors import UserError
from gptjax.text.prepare import describe, prepare
from gptjax.text.tokenizer import load_tokenizer


def run_prepare(start: Start) -> int:
    """Prepares data and tokenizer as `gptjax train` would, and prints where they are.

    Raises:
        UserError: The task's rows need no preparation, or something cannot be read.
    """
    config = start.config
    if config.task.kind != "pretrain":
        raise UserError(f"task.kind={config.task.kind} reads rows when training starts; there is nothing to prepare")
    if start.note:
        print(start.note)
    base = load_tokenizer(Path(config.init_from).expanduser() / "tokenizer.json") if config.init_from else None
    cache = Path(config.cache_dir).expanduser()
    prepared = prepare(config.data, config.tokenizer, cache, report=print, tokenizer_override=base)
    print(describe(prepared))
    print(prepared.folder)
    return 0
