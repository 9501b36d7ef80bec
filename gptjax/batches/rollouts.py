"""Responses sampled from the model → batches for reinforcement learning.

Shape suffixes: B responses, T position.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class RolloutBatch(NamedTuple):
    """Sampled responses after their prompts, padded at the end."""

    inputs: Any
    """int32 `[B, T]`."""
    targets: Any
    """int32 `[B, T]`: the next token within the response, -1 elsewhere."""
    advantages: Any
    """float32 `[B]`: reward minus the mean of its group, in standard deviations of the group."""
    rewards: Any
    """float32 `[B]`."""
    reference: Any
    """float32 `[B, T]`: log-probability of each target under the reference; 0 where there is none."""


def pack_rollouts(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], rewards: np.ndarray, max_tokens: int
) -> RolloutBatch:
    """Puts one response after each prompt; advantages and reference log-probabilities are 0 until they are filled
    in.
    """
    B = len(prompts)
    inputs, targets = np.zeros((B, max_tokens), np.int32), np.full((B, max_tokens), -1, np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = np.concatenate([prompt, response])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, len(prompt) - 1 : len(ids) - 1] = response
    rewards = rewards.astype(np.float32)
    return RolloutBatch(inputs, targets, np.zeros_like(rewards), rewards, np.zeros((B, max_tokens), np.float32))


def group_advantages(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Rewards minus the mean of their group, divided by its standard deviation (arXiv:2402.03300, section 4.1.2). 0 if
    all rewards of a group are equal.
    """
    groups = rewards.astype(np.float64).reshape(-1, group_size)
    centered = groups - groups.mean(axis=1, keepdims=True)
    deviation = groups.std(axis=1, keepdims=True)
    return np.divide(centered, deviation, out=np.zeros_like(groups), where=deviation > 1e-8).ravel().astype(np.float32)
