"""Pretraining on prepared text: predicts the next token, or the targets of `task.objective`."""

from collections.abc import Iterable, Mapping

import jax

from gptjax.batches.arranged import ArrangedWindows
from gptjax.batches.mixture import MixtureWindows, Stage
from gptjax.batches.multi import Windows
from gptjax.batches.objectives import vocabulary_of
from gptjax.batches.pretraining import MAKERS, Batch, BestFitWindows, PrefixBatch, evaluation_batches
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.errors import UserError
from gptjax.evaluation.loss import MixtureEvaluation, make_eval_step, mean_evaluation, measure
from gptjax.model.gpt import Compute
from gptjax.model.loss import loss_options, token_loss
from gptjax.model.multi_token import multi_token_loss
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task, hash_texts
from gptjax.text.shards import TokenSplit
from gptjax.text.tokenizers.base import Tokenizer


def build(config: Config, name: str, source: Source, compute: Compute, compiled: Compile) -> Task:
    """See `task.Kind`."""
    if source.mixture:
        return _build_mixture(config, source, compute, compiled)
    dataset, objective = source.texts.get(name, source.dataset), config.task.objective
    assert dataset is not None
    model, train, across = config.model, config.train, config.data.attend_across_documents
    batches = list(
        text_batches(
            objective,
            source.tokenizer,
            dataset.validation,
            model.block_size,
            train.eval_windows,
            train.micro_batch,
            across,
        )
    )
    skipped = source.skipped.get(name if name in source.texts else "", frozenset())
    ramp = train.batch_sizes if train.batch_ramp else ()
    windows: Windows = MAKERS[config.data.packing](dataset.train, model.block_size, config.seed, across, skipped, ramp)
    notes = packing_notes({"": windows})
    if objective.rearranges:
        if objective.next_sentence and source.tokenizer.end_of_text is None:
            raise UserError(
                "task.objective.next_sentence=true needs a tokenizer with <|endoftext|>, which stands between the parts"
            )
        vocabulary = vocabulary_of(source.tokenizer, objective.special_tokens)
        windows = ArrangedWindows(dataset.train, model.block_size, config.seed, across, objective, vocabulary, skipped)
        notes = tuple(note for note in (windows.note(),) if note)
    eval_step, ratio = compiled(make_eval_step(model, compute)), bytes_per_target(objective, dataset.validation)
    targets = f"{sum(int((batch.targets >= 0).sum()) for batch in batches)} targets of {dataset.hash}"
    return Task(
        windows,
        model.block_size,
        dataset.hash,
        lambda params, sharding: measure(eval_step, params, batches, sharding, ratio),
        notes,
        evaluation_batches=len(batches),
        measured_on=targets if objective.kind == "causal" else f"{targets}, {objective.kind}",
    )


def _build_mixture(config: Config, source: Source, compute: Compute, compiled: Compile) -> Task:
    """Trains on batches of several sources, and measures each source on `train.eval_windows` windows."""
    sources = source.mixture
    model, train, across = config.model, config.train, config.data.attend_across_documents
    batches = {
        name: list(evaluation_batches(one.validation, model.block_size, train.eval_windows, train.micro_batch, across))
        for name, one in sources.items()
    }
    stages = mixture_stages(config, {name: one.train.n_tokens for name, one in sources.items()})
    weights = dict(zip(sources, stages[0].weights, strict=True))
    eval_step = compiled(make_eval_step(model, compute))

    def evaluate(params: dict, sharding: jax.sharding.Sharding) -> MixtureEvaluation:
        found = {
            name: measure(
                eval_step, params, batches[name], sharding, bytes_per_target(config.task.objective, one.validation)
            )
            for name, one in sources.items()
        }
        return mean_evaluation(weights, found)

    identity = mixture_hash((one.hash for one in sources.values()), stages)
    windows = {
        name: MAKERS[config.data.packing](
            one.train, model.block_size, config.seed, across, source.skipped.get(name, frozenset())
        )
        for name, one in sources.items()
    }
    n_targets = sum(int((batch.targets >= 0).sum()) for each in batches.values() for batch in each)
    return Task(
        MixtureWindows(windows, stages),
        model.block_size,
        identity,
        evaluate,
        notes=(
            *describe_stages(config, stages, {name: one.train.n_tokens for name, one in sources.items()}),
            *packing_notes(windows),
        ),
        evaluation_batches=sum(map(len, batches.values())),
        measured_on=f"{n_targets} targets of {identity}",
    )


def packing_notes(windows: Mapping[str, Windows]) -> tuple[str, ...]:
    """A log line for each source whose documents are packed by best fit."""
    return tuple(
        f"packing{f' of {name}' if name else ''}: {one.packing.n_windows:,} windows,"
        f" {one.packing.padding_share(one.block_size):.2%} padding, {one.packing.n_cut:,} of"
        f" {one.split.n_documents:,} documents cut (longer than {one.block_size:,} tokens)"
        for name, one in windows.items()
        if isinstance(one, BestFitWindows)
    )


def mixture_stages(config: Config, n_tokens: dict[str, int]) -> tuple[Stage, ...]:
    """The weights of the sources over time, from `weight` and `changes`, `epochs`, or `mixture_temperature`."""
    if config.mixture_temperature:  # arXiv:1907.05019, section 3.2
        return (Stage(0, tuple(n ** (1 / config.mixture_temperature) for n in n_tokens.values())),)
    if config.sources[0].epochs:
        weights = (source.epochs * n_tokens[source.name] for source in config.sources)
        return (Stage(0, tuple(weights)),)
    steps = sorted({0, *(step for source in config.sources for step in source.weight_changes)})
    return tuple(Stage(step, tuple(source.weight_at(step) for source in config.sources)) for step in steps)


def mixture_hash(hashes: Iterable[str], stages: tuple[Stage, ...]) -> str:
    """The identity of the data of a run with several sources."""
    return hash_texts([*hashes, repr(stages)])


def describe_stages(config: Config, stages: tuple[Stage, ...], n_tokens: dict[str, int]) -> list[str]:
    """Log lines: the share of each source in each stage, and the number of its epochs in the run."""
    names, epochs = list(n_tokens), dict.fromkeys(n_tokens, 0.0)
    lines = []
    for stage, end in zip(stages, [*(s.first_step for s in stages[1:]), config.train.num_steps], strict=True):
        shares = [weight / sum(stage.weights) for weight in stage.weights]
        lines.append(
            f"from step {stage.first_step:,}: " + ", ".join(f"{n} {s:.1%}" for n, s in zip(names, shares, strict=True))
        )
        tokens = max(0, end - stage.first_step) * config.train.batch_size * config.model.block_size
        for name, share in zip(names, shares, strict=True):
            epochs[name] += share * tokens / n_tokens[name]
    lines.append("passes: " + ", ".join(f"{name} {times:.2f}" for name, times in epochs.items()))
    return lines


def text_batches(
    objective: ObjectiveConfig,
    tokenizer: Tokenizer,
    split: TokenSplit,
    block_size: int,
    n_windows: int,
    batch_size: int,
    across: bool,
) -> Iterable[Batch | PrefixBatch]:
    """Fixed evaluation batches of an objective, see `batches.pretraining.evaluation_batches`."""
    if not objective.rearranges:
        return evaluation_batches(split, block_size, n_windows, batch_size, across)
    vocabulary = vocabulary_of(tokenizer, objective.special_tokens)
    return ArrangedWindows(split, block_size, 0, across, objective, vocabulary).evaluation(n_windows, batch_size)


def next_token_loss(config: Config, _name: str = "") -> StatesLoss:
    """The cross-entropy of the batch's targets, plus that of multi-token heads if the objective has them."""
    model = config.model
    options = loss_options(model, config.train.label_smoothing, config.train.z_loss)
    if config.task.objective.kind == "multi_token":
        return multi_token_loss(model, options)
    return lambda params, x_BTD, batch: token_loss(model, options, params, x_BTD, batch)


def bytes_per_target(objective: ObjectiveConfig, split: TokenSplit) -> float | None:
    """UTF-8 bytes of a split's text per target; None if not every token of the text is a target."""
    return split.n_bytes / max(1, split.n_tokens - 1) if objective.measures_text else None


KIND = Kind(build, next_token_loss)
