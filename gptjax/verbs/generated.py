"""Texts that a run of instruct or seq2seq writes: `gptjax evaluate --generate true` scores them, `gptjax predict` adds
them to rows.
"""

from collections.abc import Callable, Sequence

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.verbs.evaluate import EvaluateConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.continuations import generate_until
from gptjax.evaluation.generated import answer_results, extract_answer
from gptjax.evaluation.text_scores import require_text_scores, text_scores
from gptjax.generation.targets import target_texts
from gptjax.text.chats import Chat
from gptjax.text.tokenizer import Tokenizer

GENERATING = ("instruct", "seq2seq")
"""Tasks whose rows have a text that the model can write."""
Notify = Callable[[str], None]


def measure_generated(
    run: LoadedRun,
    tokenizer: Tokenizer,
    options: EvaluateConfig,
    sources: Sequence[tuple[str, list]],
    notify: Notify,
) -> list[str]:
    """Writes the target of each pair, or the last response of each chat, greedily; returns the lines to print.

    Args:
        run: Of one of the tasks in `GENERATING`.
        tokenizer: The run's.
        options: Of them `max_new_tokens`, `pattern` and `batch_size` are read.
        sources: Names and their examples.
        notify: Gets one line about texts that are cut.

    Raises:
        UserError: A library of the scores is missing, or no chat ends with a response.
    """
    require_text_scores()
    write = _targets if run.config.task.kind == "seq2seq" else _responses
    lines, answers, accepted = [], [], []
    for name, examples in sources:
        texts, right = write(run, tokenizer, options, examples, notify)
        texts = [extract_answer(text, options.pattern) or "" for text in texts]
        lines.append(f"{name}  {answer_results(texts, right)}")
        answers, accepted = [*answers, *texts], [*accepted, *right]
    return [
        *(lines if len(lines) > 1 else []),
        str(answer_results(answers, accepted)),
        f"scores      {text_scores(answers, accepted)}",
        f"rows        {', '.join(name for name, _ in sources)}: {len(answers):,}",
    ]


def write_targets(
    run: LoadedRun, tokenizer: Tokenizer, sources: Sequence[str], new_tokens: int, batch_size: int, notify: Notify
) -> list[str]:
    """Returns the most likely target of each source, by greedy decoding."""
    sampling = SampleConfig(temperature=0.0, max_new_tokens=new_tokens)
    texts = []
    for first in range(0, len(sources), batch_size):
        here = list(sources[first : first + batch_size])
        filled = (here * batch_size)[: min(batch_size, len(sources))]  # all batches have as many rows
        texts += target_texts(run.config.model, run.params, tokenizer, filled, sampling, notify)[: len(here)]
    return texts


def write_responses(
    run: LoadedRun, tokenizer: Tokenizer, prompts: Sequence[str], new_tokens: int, batch_size: int, notify: Notify
) -> list[str]:
    """Returns the most likely response to each prompt in the run's template, by greedy decoding."""
    start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids = [np.array([*start, *tokenizer.encode(prompt)], np.int32) for prompt in prompts]
    model = run.config.model
    if cut := sum(len(one) > model.block_size for one in ids):
        notify(f"{cut:,} prompts are cut at their start to the {model.block_size:,} tokens that the model reads")
    sampling = SampleConfig(temperature=0.0, max_new_tokens=new_tokens)
    contexts = [one[-model.block_size :] for one in ids]
    return generate_until(model, run.params, tokenizer, contexts, sampling, batch_size, notify)


def _targets(run, tokenizer, options, pairs, notify) -> tuple[list[str], list[tuple[str]]]:
    sources = [pair.source for pair in pairs]
    texts = write_targets(run, tokenizer, sources, options.max_new_tokens, options.batch_size, notify)
    return texts, [(pair.target,) for pair in pairs]


def _responses(run, tokenizer, options, chats: list[Chat], notify) -> tuple[list[str], list[tuple[str]]]:
    ended = [chat for chat in chats if chat.ends_in_target]
    if not ended:
        raise UserError(f"generate=True: none of {len(chats):,} chats ends with a message of the assistant")
    if left_out := len(chats) - len(ended):
        notify(f"{left_out:,} chats are left out: their last message is not the assistant's")
    places = [chat.targets[-1][0] for chat in ended]
    prompts = [chat.text[:place] for chat, place in zip(ended, places, strict=True)]
    texts = write_responses(run, tokenizer, prompts, options.max_new_tokens, options.batch_size, notify)
    return texts, [(chat.text[place:],) for chat, place in zip(ended, places, strict=True)]
