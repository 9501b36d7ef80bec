"""`gptjax sample`."""

import sys
from pathlib import Path

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import sample_texts
from gptjax.machine import compile_cache
from gptjax.report.progress import notify


def run_sample(config: SampleConfig, prompts: list[str]) -> int:
    """Prints continuations of prompts; a single one as it is made."""
    compile_cache.start()
    run = load_run(Path(config.run_dir).expanduser(), config.checkpoint, config.strict, notify, config.base)
    if run.tokenizer is None:
        raise UserError(f"{config.run_dir}: has no tokenizer; import the model again with --tokenizer gpt2")
    one = len(prompts) * config.num_samples == 1
    if one:
        _write(prompts[0])
    texts = sample_texts(
        run.config.model,
        run.params,
        run.tokenizer,
        prompts,
        config,
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


def read_prompts(config: SampleConfig) -> list[str]:
    """The texts to continue: from the flags, a file, or standard input.

    Raises:
        UserError: There is none, or it is not UTF-8.
    """
    if not config.run_dir:
        raise UserError("command line: --run_dir is missing; name the folder of a trained run")
    if config.prompt:
        for number, prompt in enumerate(config.prompt, 1):
            if not prompt.isprintable() and any("\ud800" <= character <= "\udfff" for character in prompt):
                raise UserError(f"prompt {number} is not UTF-8; write it to a file in UTF-8 and give --prompt_file")
        return list(config.prompt)
    try:
        if config.prompt_file:
            text = Path(config.prompt_file).expanduser().read_text(encoding="utf-8")
        else:
            text = sys.stdin.buffer.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{config.prompt_file or 'standard input'}: the prompt cannot be read: {error}") from None
    if not text:
        raise UserError("the prompt is empty; give --prompt TEXT, --prompt_file FILE or text on standard input")
    return [text]


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
