"""`gptjax sample`."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gptjax.checkpoints.run_dir import LoadedRun, load_run
from gptjax.config.model import ModelConfig
from gptjax.config.rules import no_effect
from gptjax.config.run import Config
from gptjax.config.task import CHATS
from gptjax.config.verbs.decoding import DecodingConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import Sample, samples
from gptjax.generation.targets import target_texts
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.report.tokens import TokenRow, print_tokens
from gptjax.tasks.instruct import chat_template
from gptjax.tasks.multi import parts_of
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.unicode import has_surrogate

TARGET_OPTIONS = (
    *("checkpoint", "strict", "base", "run_dir", "prompt", "prompt_file"),
    *("max_new_tokens", "num_beams", "length_penalty"),
)
"""Options of a run with task.kind=seq2seq; temperature may be 0, which `num_beams` demands."""


def run_sample(config: SampleConfig, prompts: list[str]) -> int:
    """Prints samples of prompts. A single sample is streamed."""
    run, tokenizer, template = load_for_prompts(config)
    if run.config.model.encoder_layers:
        for text in write_targets(run, tokenizer, prompts, config):
            _write(f"{text}\n")
        return 0
    draft, prompts = load_draft(config, tokenizer), in_template(prompts, template)
    one = len(prompts) * config.num_samples == 1 and not config.json and not config.logprobs
    late: list[str] = []  # what a draft has to say comes when the text has ended
    if one:
        _write(prompts[0])
    found = samples(
        run.config.model,
        run.params,
        tokenizer,
        prompts,
        config,
        at_start=template is not None,
        prefix=run.config.task.objective.kind == "prefix",
        draft=draft,
        on_text=(lambda _prompt, _sample, piece: _write(piece)) if one else None,
        notify=late.append if config.speculates else notify,
    )
    if one:
        _write("\n")
    for line in late:
        notify(line)
    if one:
        return 0
    for number, (prompt, row) in enumerate(zip(prompts, found, strict=True)):
        for sample in row:
            if config.json:
                _write(json.dumps({"prompt": number} | describe(tokenizer, sample), ensure_ascii=False) + "\n")
            elif config.logprobs:
                print_tokens(prompt, token_rows(tokenizer, sample))
            else:
                _write(f"{prompt}{sample.text}\n---------------\n")
    return 0


def load_for_prompts(config: SampleConfig) -> tuple[LoadedRun, Tokenizer, str | None]:
    """The run, its tokenizer, and the chat template of its prompts; None: prompts are used as they are.

    Raises:
        UserError: The run has no tokenizer, or `config.raw` has no effect.
    """
    compile_cache.start()
    run = load_run(Path(config.run_dir).expanduser(), config.checkpoint, config.strict, notify, config.base)
    if run.tokenizer is None:
        raise UserError(f"{config.run_dir}: has no tokenizer; import the model again with --tokenizer gpt2")
    check_continues(run.config, config.run_dir)
    if not run.config.learned_text:
        notify(
            f"{config.run_dir}: task.kind={run.config.task.kind} learned no text, so samples say little; see predict"
        )
    return run, run.tokenizer, prompt_template(run, config.raw, config.run_dir)


def load_draft(options: DecodingConfig, tokenizer: Tokenizer) -> tuple[ModelConfig, dict] | None:
    """Config and params of the model of `draft_run_dir`; None where none is named.

    Raises:
        UserError: It has another tokenizer than the run, or does not read a prompt from left to right.
    """
    if not options.draft_run_dir:
        return None
    run = load_run(Path(options.draft_run_dir).expanduser(), options.checkpoint, options.strict, notify)
    model, where = run.config.model, f"draft_run_dir={options.draft_run_dir}"
    if run.tokenizer is None or run.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{where}: has another tokenizer than the run; a draft needs the same one")
    check_continues(run.config, where)
    if model.encoder_layers or run.config.task.objective.kind == "prefix":
        raise UserError(f"{where}: a draft needs a run that reads a prompt from left to right")
    return model, run.params


def write_targets(run: LoadedRun, tokenizer: Tokenizer, sources: Sequence[str], options: SampleConfig) -> list[str]:
    """Returns the target that an encoder-decoder generates for each source.

    Raises:
        UserError: An option is set that applies only to decoders.
    """
    for field in dataclasses.fields(SampleConfig):
        if field.name not in TARGET_OPTIONS and (field.name != "temperature" or options.temperature):
            no_effect("", options, field.name, False, "a run that continues text")
    return target_texts(run.config.model, run.params, tokenizer, sources, options, notify)


def check_continues(config: Config, where: str) -> None:
    """Checks that the model of a run can continue text.

    Raises:
        UserError: It cannot; the message gives the reason.
    """
    if reason := config.why_no_sample:
        raise UserError(f"{where}: cannot continue text: task.objective.kind={config.task.objective.kind}; {reason}")


def prompt_template(run: LoadedRun, raw: bool, where: str) -> str | None:
    """The chat template for prompts of a run; None: prompts are used as they are.

    Args:
        run: The trained run.
        raw: Whether to use prompts as they are.
        where: The run, for error messages.

    Raises:
        UserError: `raw` has no effect, or the run has chats of several templates.
    """
    if raw and not any(part.task.kind in CHATS for part in parts_of(run.config).values()):
        raise UserError(f"raw=True has no effect: {where} has task.kind={run.config.task.kind}, which has no template")
    return None if raw else chat_template(run.config)


def in_template(prompts: Sequence[str], template: str | None) -> list[str]:
    """Formats each prompt as a user message with a chat template; None: unchanged."""
    if template is None:
        return list(prompts)
    return [render_prompt([Message(USER, prompt)], template) for prompt in prompts]


def describe(tokenizer: Tokenizer, sample: Sample) -> dict:
    """A sample as JSON values: text, finish reason, token ids and, if requested, log-probabilities of each token."""
    values = {"text": sample.text, "finish_reason": sample.finish, "tokens": sample.tokens}
    if sample.logprobs is None:
        return values
    rows = [
        {
            "text": row.text,
            "logprob": row.logprob,
            "top": [dict(zip(("text", "logprob"), t, strict=True)) for t in row.top],
        }
        for row in token_rows(tokenizer, sample)
    ]
    return values | {"logprobs": rows}


def token_rows(tokenizer: Tokenizer, sample: Sample) -> list[TokenRow]:
    """The tokens of a sample with their log-probabilities and those of the most likely tokens."""
    if sample.logprobs is None:
        return []
    return [
        TokenRow(
            tokenizer.decode([token]),
            round(float(chosen), 6),
            tuple((tokenizer.decode([id]), round(float(logprob), 6)) for id, logprob in zip(ids, top, strict=True)),
        )
        for token, chosen, ids, top in zip(sample.tokens, *sample.logprobs, strict=True)
    ]


def read_prompts(config: SampleConfig) -> list[str]:
    """Reads the prompts from the flags, a file, or standard input. Only a byte order mark is removed.

    Raises:
        UserError: There is no prompt, or it is not UTF-8.
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
