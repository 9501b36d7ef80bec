"""`gptjax prepare`."""

from pathlib import Path

from gptjax.config.start import Start
from gptjax.errors import UserError
from gptjax.text.cleaning.store import Share
from gptjax.text.mixture import prepare_sources
from gptjax.text.prepare import clean_share, describe, prepare
from gptjax.text.tokenizer import load_tokenizer


def run_prepare(start: Start, shard: str = "") -> int:
    """Prepares data and tokenizer like `gptjax train`, and prints their folder. With a shard, it only cleans.

    Args:
        start: The config of a run.
        shard: "I/N": only clean share I of N; empty: prepare everything.

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
    if shard and config.sources:
        raise UserError(
            "shard: of several sources, clean each by itself: --data.path and so on, with the same cache_dir"
        )
    if config.sources:
        sources = {source.name: source.data for source in config.sources}
        for name, one in prepare_sources(sources, config.tokenizer, cache, tokenizer_override=base).items():
            print(f"{name}: {describe(one)}\n{one.folder}")
        return 0
    if shard:
        index, count = map(int, shard.split("/"))
        if clean_share(config.data, cache, Share(index - 1, count)):
            print("cleaning: all parts are done; gptjax prepare without --shard uses them")
        return 0
    prepared = prepare(config.data, config.tokenizer, cache, report=print, tokenizer_override=base)
    print(describe(prepared))
    print(prepared.folder)
    return 0
