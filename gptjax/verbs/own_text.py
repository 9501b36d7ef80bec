"""Opens the text of a run again, for the verbs that measure or show it."""

from collections.abc import Callable
from pathlib import Path

from gptjax.config.run import Config
from gptjax.text.prepare import Prepared, prepare
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.tokenizers.extended import with_special_tokens


def open_own_text(config: Config, tokenizer: Tokenizer, notify: Callable[[str], None]) -> Prepared:
    """Returns the text of a run with a single source, as tokens of the run's tokenizer.

    If the text has changed since the run was trained, a tokenizer that is learned from text would be another one; the
    run's is used.

    Args:
        config: Of a run with task.kind=pretrain.
        tokenizer: That of the run.
        notify: Receives lines of progress.

    Raises:
        UserError: The text no longer exists, or cannot be read.
    """
    cache = Path(config.cache_dir).expanduser()
    override = tokenizer if config.init_from else None  # the data of such a run was prepared with the base's tokenizer
    prepared = prepare(config.data, config.tokenizer, cache, report=notify, tokenizer_override=override)
    special = config.task.objective.special_tokens
    if with_special_tokens(prepared.tokenizer, special).fingerprint == tokenizer.fingerprint:
        return prepared
    return prepare(config.data, config.tokenizer, cache, report=notify, tokenizer_override=tokenizer)
