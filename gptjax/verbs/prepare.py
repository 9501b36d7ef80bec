"""`gptjax prepare`."""

from pathlib import Path

from gptjax.config.run import Config
from gptjax.text.prepare import describe, prepare


def run_prepare(config: Config) -> int:
    """Prepares data and tokenizer as `gptjax train` would, and prints where they are."""
    prepared = prepare(config.data, config.tokenizer, Path(config.cache_dir).expanduser(), report=print)
    print(describe(prepared))
    print(prepared.folder)
    return 0
