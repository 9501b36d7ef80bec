"""`gptjax sample`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax.checkpoints.run_dir import LoadedRun, load_run
from gptjax.config.verbs import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import sample_texts
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.tasks.instruct import chat_template
from gptjax.tasks.multi import parts_of
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.text.unicode import has_surrogate


def run_sample(config: SampleConfig, prompts: list[str]) -> int:
    """Prints continuations of prompts; a single one as it is made."""
    compile_cache.start()
    run = load_run(Path(config.run_dir).expanduser(), config.checkpoint, config.strict, notify, config.base)
    if run.tokenizer is None:
        raise UserError(f"{config.run_dir}: has no tokenizer; import the model again with --tokenizer gpt2")
    prompts, at_start = render_prompts(run, prompts, config.raw, config.run_dir)
    one = len(prompts) * config.num_samples == 1
    if one:
        _write(prompts[0])
    texts = sample_texts(
        run.config.model,
        run.params,
        run.tokenizer,
        prompts,
        config,
        at_start=at_start,
        on_text=(lambda _prompt, _sample, piece: _write(piece)) if one else None,
        notify=notify,
    )
    if one:
        _write("\n")
    else:
        for prompt, continuations in zip(prompts, texts, strict=True):
            for text in continuations:
                _write(f"{prompt}{text}\n---------------\n")
    return 0


def render_prompts(run: LoadedRun, prompts: Sequence[str], raw: bool, where: str) -> tuple[list[str], bool]:
    """Returns the prompts as the model reads them, and whether they begin a document.

    To a run that learned chats, each prompt is the user's message in the run's template.

    Args:
        run: The trained run.
        prompts: As given.
        raw: Whether the prompts stay as they are.
        where: Of the run, for error messages.

    Raises:
        UserError: `raw` has no effect, or the run has chats of several templates.
    """
    if raw and not any(part.task.kind == "instruct" for part in parts_of(run.config).values()):
        raise UserError(f"raw=True has no effect: {where} has task.kind={run.config.task.kind}, which has no template")
    template = None if raw else chat_template(run.config)
    if template is None:
        return list(prompts), False
    return [render_prompt([Message(USER, prompt)], template) for prompt in prompts], True


def read_prompts(config: SampleConfig) -> list[str]:
    """The prompts: from the flags, a file, or standard input, byte for byte but for a byte order mark.

    Raises:
        UserError: There is none, or it is not UTF-8.
    """
    if not config.run_dir:
        raise UserError("command line: --run_dir is missing; name the folder of a trained run")
    if config.prompt:
        for number, prompt in enumerate(config.prompt, 1):
            if has_surrogate(prompt):
                raise UserError(f"prompt {number} is not UTF-8; write it to a file in UTF-8 and give --prompt_file")
        return list(config.prompt)
    try:
        path = Path(config.prompt_file).expanduser()
        text = (path.read_bytes() if config.prompt_file else sys.stdin.buffer.read()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.prompt_file or 'standard input'}: the prompt cannot be read: {error}") from None
    if not text:
        raise UserError("the prompt is empty; give --prompt TEXT, --prompt_file FILE or text on standard input")
    return [text]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
