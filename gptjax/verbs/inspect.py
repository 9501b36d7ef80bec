"""`gptjax inspect`."""

from pathlib import Path

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.inspect import InspectConfig
from gptjax.errors import UserError
from gptjax.evaluation.inside import inspect_text
from gptjax.evaluation.likelihood import check_likelihood
from gptjax.files import check_writable, write_atomic
from gptjax.machine import compile_cache
from gptjax.report.inspect_page import render_inspection
from gptjax.report.progress import notify
from gptjax.text.unicode import has_surrogate

PAGE_FILE = "inspect.html"
MOST_TOKENS = 512
"""Largest number of tokens: the page contains a number for every pair of tokens and every head."""


def run_inspect(run_dir: str, options: InspectConfig) -> int:
    """Writes an HTML page with the activations of a run's model for a text, and prints its path.

    Raises:
        UserError: The run has no tokenizer, does not predict text from left to right, or the text is too long or short.
    """
    if has_surrogate(options.text):
        raise UserError("text is not UTF-8")
    place = Path(run_dir).expanduser()
    path = Path(options.out).expanduser() if options.out else place / PAGE_FILE
    if options.out:
        check_writable("out", path)
    compile_cache.start()
    run = load_run(place, options.checkpoint, options.strict, notify, options.base)
    if run.tokenizer is None:
        raise UserError(f"{run_dir}: has no tokenizer; import the model again with --tokenizer gpt2")
    if run.config.learned_text or run.config.why_no_sample:  # of other runs with heads, attention is shown
        check_likelihood(run.config, run_dir)
    tokenizer, most = run.tokenizer, min(MOST_TOKENS, run.config.model.block_size)
    tokens = tokenizer.encode(options.text)
    if not 2 <= len(tokens) <= most:
        raise UserError(
            f"text has {len(tokens)} tokens; give one of 2 to {most} (model.block_size, at most {MOST_TOKENS})"
        )
    inspection = inspect_text(run.config.model, run.params, tokens)
    page = render_inspection(inspection, place.resolve().name, lambda token: tokenizer.decode([token]))
    write_atomic(path, page.encode("utf-8", "replace"))
    print(path)
    return 0
