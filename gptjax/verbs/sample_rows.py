"""`gptjax sample --prompt_file IN.jsonl --out OUT.jsonl`: samples continuations for a prompt of each row of a file.

Finished rows are stored in `OUT.jsonl.partial`, so that the same command resumes. Rows of similar length are decoded
together; neither this nor a resume changes the samples.
"""

import json
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import xxhash

from gptjax.config.reader import to_dict
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.files import write_atomic
from gptjax.generation.sample import encode_prompts, samples
from gptjax.report.progress import RowProgress, notify
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.text.counts import counted
from gptjax.text.formats import Row
from gptjax.text.rows import field_value, read_rows
from gptjax.verbs.output_rows import renamed, write_file
from gptjax.verbs.sample import describe, load_draft, load_for_prompts

OUTPUT = "samples"
UNREAD = ("out", "batch_size", "run_dir", "prompt_file", "strict")
"""Options that do not change samples. The content of the files that they name is part of the fingerprint."""


def run_sample_rows(config: SampleConfig) -> int:
    """Samples continuations for the rows of a file, and prints their number."""
    print(f"{config.out}: {sample_rows(config, notify):,} rows")
    return 0


def sample_rows(config: SampleConfig, notify: Callable[[str], None] = print) -> int:
    """Writes each row with the samples of its prompt, in input order; returns the number of rows.

    Raises:
        UserError: A row does not have a field of the template, a prompt cannot be encoded, or a file cannot be written.
    """
    counts: Counter[str] = Counter()
    rows = list(read_rows([config.prompt_file], "prompt_file", counts=counts))
    if not rows:
        raise UserError(f"{config.prompt_file}: has no rows")
    prompts = [fill(config.prompt_template, row) for row in rows]
    run, tokenizer, template = load_for_prompts(config)
    if run.config.model.encoder_layers:
        raise UserError(f"out={config.out!r}: rows of a file are not written for task.kind=seq2seq; give --prompt")
    texts = [prompt if template is None else render_prompt([Message(USER, prompt)], template) for prompt in prompts]
    lengths = [len(ids) for ids in encode_prompts(tokenizer, texts, config.allow_special)]
    done = _Partial(Path(f"{config.out}.partial").expanduser(), _fingerprint(config, run.step, run.config, texts))
    if done.rows:
        notify(f"{config.out}: {len(done.rows):,} of {len(rows):,} rows are done already")
    left = sorted((number for number in range(len(rows)) if number not in done.rows), key=lambda n: (-lengths[n], n))
    _tell_of_long(lengths, config, run.config.model.block_size, notify)
    draft = load_draft(config, tokenizer)
    progress = RowProgress(len(rows), len(done.rows), "rows")
    try:
        for first in range(0, len(left), config.batch_size):
            numbers = left[first : first + config.batch_size]
            # The last batch is padded with copies, so that no additional program is compiled for it.
            filled = (numbers * config.batch_size)[: min(config.batch_size, len(rows))]
            found = samples(
                *(run.config.model, run.params, tokenizer, [texts[n] for n in filled], config),
                at_start=template is not None,
                prefix=run.config.task.objective.kind == "prefix",
                numbers=filled,
                draft=draft,
            )
            done.add({n: [describe(tokenizer, one) for one in row] for n, row in zip(numbers, found, strict=False)})
            progress.advance(len(numbers))
    finally:
        progress.close()
        done.close()
    count = write_file(_outputs(rows, done.rows, counts), Path(config.out).expanduser())
    done.path.unlink()
    for line in counted(counts):
        notify(line)
    return count


def fill(template: str, row: Row) -> str:
    """Replaces names of fields in the template by the row's values; values that are no text are written as JSON.

    Raises:
        UserError: The template is malformed or has no field, or the row does not have a field.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"prompt_template={template!r} is malformed: {error}; write {{{{ and }}}} for braces") from None
    if not any(name for _, name, _, _ in parts):
        raise UserError(f"prompt_template={template!r} names no field, such as {{prompt}}")
    text = ""
    for literal, name, spec, conversion in parts:
        text += literal
        if name is None:
            continue
        if spec or conversion:
            raise UserError(f"prompt_template={template!r}: {{{name}}} must be a field's name alone")
        value = field_value(row, name, "prompt_template")
        text += value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text


class _Partial:
    """An append-only file of finished rows."""

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.rows = path, dict[int, list[dict[str, Any]]]()
        header = json.dumps({"fingerprint": fingerprint})
        try:
            old = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
            if old and old[0] != header:
                raise UserError(
                    f"{path}: is of another run, of other options or of other prompts; delete it, or name another out"
                )
            for line in old[1:]:  # an incomplete last line has no line break
                for number, found in json.loads(line).items():
                    self.rows[int(number)] = found
            write_atomic(path, "".join(f"{line}\n" for line in [header, *old[1:]]).encode())
            self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115
        except (OSError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: cannot be read or written: {error}") from None

    def add(self, found: dict[int, list[dict[str, Any]]]) -> None:
        self.rows |= found
        self._file.write(json.dumps(found) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _tell_of_long(lengths: Sequence[int], config: SampleConfig, block_size: int, notify: Callable[[str], None]) -> None:
    long = sum(length > block_size for length in lengths)
    slides = sum(length + config.max_new_tokens > block_size + 1 for length in lengths)
    if long:
        notify(f"{long:,} prompts are longer than model.block_size={block_size}; the model reads their last tokens")
    if slides:
        notify(f"{slides:,} contexts may become full (model.block_size={block_size}); they slide then")


def _outputs(rows: Sequence[Row], found: dict[int, list], counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        yield renamed(row, (OUTPUT,), counts) | {OUTPUT: found[number]}


def _fingerprint(config: SampleConfig, step: int, run: Any, texts: Sequence[str]) -> str:
    options = {name: value for name, value in to_dict(config).items() if name not in UNREAD}
    return xxhash.xxh3_128_hexdigest(json.dumps([options, step, to_dict(run), texts]).encode())
