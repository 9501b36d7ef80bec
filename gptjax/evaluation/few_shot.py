"""Chooses few-shot examples and builds prompts with them."""

from collections.abc import Sequence

import numpy as np

from gptjax.errors import UserError
from gptjax.evaluation.benchmarks import SEPARATOR, Item


def choose_shots(pool: Sequence[Item], shots: int, seed: int) -> list[Item]:
    """Chooses the examples before every question: the first `shots` of the pool, shuffled with `seed`. Returns one more
    if the pool has it, to replace a question that is itself an example.

    Raises:
        UserError: The pool has too few items.
    """
    if len(pool) < shots:
        raise UserError(f"shots={shots}: there are {len(pool)} rows to choose from; give more rows, or fewer shots")
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[number] for number in order[: shots + 1]] if shots else []


def prompts(item: Item, examples: Sequence[Item], shots: int) -> tuple[str, ...]:
    """The contexts of an item after `shots` of the examples, without the item itself.

    Raises:
        UserError: Too few examples remain without the item.
    """
    others = [example.shown for example in examples if example != item][:shots]
    if len(others) < shots:
        raise UserError(f"{item.where}: shots={shots}: too few other rows; give more rows, or shots_path")
    before = "".join(text + SEPARATOR for text in others)
    return tuple(before + context for context in item.contexts)
