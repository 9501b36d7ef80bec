"""`gptjax evaluate --benchmark NAME`: multiple choice by likelihood, or generated answers, on files of rows."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.data import DataConfig
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.benchmarks import COLUMNS, Item, read_items
from gptjax.evaluation.continuations import generate_until
from gptjax.evaluation.few_shot import choose_shots, prompts
from gptjax.evaluation.generated import AnswerResults, answer_results, extract_answer
from gptjax.evaluation.likelihood import check_likelihood, make_scorer, score_spans
from gptjax.evaluation.multiple_choice import ChoiceResults, choice_results, choice_spans
from gptjax.evaluation.statistics import joined
from gptjax.evaluation.text_scores import require_text_scores, text_scores
from gptjax.text.counts import counted
from gptjax.text.rows import limited, normalised, read_dataset_rows, read_rows
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.training.step import compute_options

Notify = Callable[[str], None]


def measure_benchmark(
    run: LoadedRun,
    tokenizer: Tokenizer,
    options: EvaluateConfig,
    sources: Sequence[tuple[str, DataConfig]],
    notify: Notify,
    progress: Callable[[int, str], None],
) -> list[str]:
    """Measures a run on each source and on all sources together; returns the lines to print.

    Raises:
        UserError: The run does not predict text from left to right, a row is invalid, or there are too few rows for the
            few-shot examples.
    """
    check_likelihood(run.config, options.run_dir)
    if options.text_scores:
        require_text_scores()
    measure = _generated if options.benchmark == "generate" else _chosen
    pool = None
    if options.shots_path:
        data = dataclasses.replace(
            options.data, path=options.shots_path, hf_dataset="", streaming=False, max_documents=0
        )
        pool = _items(options, data, "shots_path", notify)
    found, lines = [], []
    for name, data in sources:
        items = _items(options, data, "data.path", notify)
        examples = choose_shots(items if pool is None else pool, options.shots, options.seed)
        results, note = measure(
            run, tokenizer, options, items, examples, notify, lambda n, name=name: progress(n, name)
        )
        found.append((name, results))
        lines += [f"context     {name}: {note}"] if note else []
    whole = joined([results for _, results in found])
    width = max(5, *(len(name) for name, _ in found))
    each = [f"{name:{width}}  {results}" for name, results in found]
    each = [*each, f"{'total':{width}}  {whole}"] if len(found) > 1 else [str(whole)]
    if options.text_scores:
        each.append(f"scores      {text_scores(whole.answers, whole.accepted)}")
    return [
        *each,
        f"benchmark   {options.benchmark}, {_shots(options)}",
        f"rows        {', '.join(name for name, _ in found)}: {len(whole.right):,}",
        *lines,
    ]


def _items(options: EvaluateConfig, data: DataConfig, option: str, notify: Notify) -> list[Item]:
    counts: Counter[str] = Counter()
    names = COLUMNS.get(options.benchmark, ())
    rows = read_dataset_rows(data, counts) if data.hf_dataset else read_rows(data.path, option, data, counts, names)
    items = list(read_items(options.benchmark, (normalised(row, data) for row in limited(rows, data)), counts))
    for line in counted(counts):
        notify(line)
    if not items:
        raise UserError(f"{option}: no rows with an answer in {', '.join(data.path) or data.hf_dataset}")
    return items


def _chosen(run, tokenizer, options, items, examples, notify, progress) -> tuple[ChoiceResults, str]:
    model = run.config.model
    spans, cut = choice_spans(items, examples, options.shots, tokenizer, model.block_size)
    scorer = make_scorer(model, compute_options(run.config))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    scores = score_spans(scorer, run.params, spans, model.block_size, options.batch_size, device, progress)
    note = f"{cut:,} items were cut at their start to the {model.block_size:,} tokens that the model reads"
    return choice_results(items, scores), note if cut else ""


def _generated(run, tokenizer, options, items, examples, notify, progress) -> tuple[AnswerResults, str]:
    model, asked, cut = run.config.model, [], 0
    for item in items:
        [prompt] = prompts(item, examples, options.shots)
        ids = tokenizer.encode(prompt)
        if not len(ids):
            if tokenizer.end_of_text is None:
                raise UserError(f"{item.where}: the context is empty; give at least one character")
            ids = np.array([tokenizer.end_of_text], np.int32)
        cut += len(ids) > model.block_size
        asked.append(ids)
    sampling = SampleConfig(temperature=0.0, max_new_tokens=options.max_new_tokens, stop=options.stop)
    contexts = [ids[-model.block_size :] for ids in asked]
    texts = generate_until(model, run.params, tokenizer, contexts, sampling, options.batch_size, notify)
    answers = [extract_answer(text, options.pattern) for text in texts]
    note = f"{cut:,} items were cut at their start to the {model.block_size:,} tokens that the model reads"
    return answer_results(answers, [item.accepted for item in items]), note if cut else ""


def _shots(options: EvaluateConfig) -> str:
    if not options.shots:
        return "no examples in the prompt"
    where = ", ".join(options.shots_path) or "other rows of the same file"
    return f"{options.shots} examples from {where} (seed {options.seed})"
