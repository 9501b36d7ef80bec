"""Reinforcement learning with a reward function of the user (GRPO, arXiv:2402.03300, section 4.1).

Each step samples a group of responses to each of some prompts from the current model. The update makes responses more
likely that have a higher reward than the mean of their group. `task.kl_weight` keeps the model near the one before
training. Each sample is used for one update, so the ratio of new to old probabilities is 1 and needs no clipping.

Shape suffixes: B responses, T position, D n_embd.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.batches.permutation import shuffled
from gptjax.batches.rollouts import RolloutBatch, group_advantages, pack_rollouts
from gptjax.batches.rows import ALL, Rows, take_rows
from gptjax.config.data import DataConfig
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.task import AdapterConfig, TaskConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.rewards import RewardScores
from gptjax.generation.decode import generate
from gptjax.model.gpt import Compute, states_and_extras
from gptjax.model.loss import inputs_of
from gptjax.ops.cross_entropy import Loss
from gptjax.tasks.functions import call_function
from gptjax.tasks.heads import flat
from gptjax.tasks.log_probs import token_log_probs
from gptjax.tasks.task import Compile, Kind, Source, StatesLoss, Task, hash_texts, longest
from gptjax.text.chats import USER, Message, render_prompt
from gptjax.text.formats import Row
from gptjax.text.rows import text_field
from gptjax.text.tokenizers.base import Tokenizer


class Prompt(NamedTuple):
    """One training prompt."""

    text: str
    """The prompt in the chat template, up to the start of the response."""
    values: dict[str, Any]
    """The row, for the reward function."""
    where: str


def build(config: Config, name: str, source: Source, compute: Compute, _compiled: Compile) -> Task:
    """See `task.Kind`."""
    examples, tokenizer = source.examples[name], source.tokenizer
    assert source.base is not None  # the task requires init_from
    lora = config.model.adapter.kind != "none"
    base = (
        source.base if config.task.kl_weight and not lora else None
    )  # with LoRA, the frozen parameters are the reference
    rollouts = Rollouts(config, tokenizer, examples.train, base, compute)

    def evaluate(params: dict, _sharding: jax.sharding.Sharding) -> RewardScores:
        return measure_rewards(config, params, tokenizer, examples.validation)

    note = (
        f"{len(examples.train):,} prompts, {len(examples.validation):,} to validate on; {config.task.group_size}"
        f" responses of up to {config.task.response_tokens} tokens to each of"
        f" {config.train.batch_size // config.task.group_size} prompts in a step"
    )
    return Task(
        rollouts,
        longest(config),
        hash_texts(example.text for example in examples.train),
        evaluate,
        (note, *examples.notes),
        measured_on=hash_texts(example.text for example in examples.validation),
        follow=rollouts.follow,
    )


class Rollouts:
    """Batches sampled from the model; they depend on the seed, the step, and the parameters of the last `follow`."""

    def __init__(
        self, config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt], base: dict | None, compute: Compute
    ):
        self._config, self._tokenizer, self._prompts = config, tokenizer, prompts
        self._ids = encode_prompts(config, tokenizer, prompts)
        self._base = None if base is None else jax.device_put(base, jax.local_devices()[0])
        model = dataclasses.replace(config.model, adapter=AdapterConfig(), dropout=0.0)
        self._log_probs = jax.jit(_target_log_probs(model, compute))
        self._params: dict = {}

    @property
    def tokens_per_epoch(self) -> int:
        """Number of positions of one group of responses to every prompt."""
        return len(self._prompts) * self._config.task.group_size * longest(self._config)

    def follow(self, params: dict) -> None:
        """Sets the parameters for sampling the next batch."""
        self._params = jax.device_put(params, jax.local_devices()[0])

    def documents(self, step: int, batch_size: int) -> list[tuple[int, int]]:
        """Returns the first and the last prompt of each row of the batch of `step`: the same prompt twice."""
        return [(n, n) for n in self._numbers(step, batch_size) for _ in range(self._config.task.group_size)]

    def batch(self, step: int, batch_size: int, rows: Rows = ALL) -> RolloutBatch:
        """Samples the responses of `step`, computes their rewards and advantages; returns `rows` of them."""
        task, numbers = self._config.task, self._numbers(step, batch_size)
        prompts, ids = [self._prompts[n] for n in numbers], [self._ids[n] for n in numbers]
        seed = int(np.random.SeedSequence((self._config.seed, 2, step)).generate_state(1)[0])
        options = SampleConfig(num_samples=task.group_size, max_new_tokens=task.response_tokens, seed=seed)
        groups = sample_responses(self._config, self._params, self._tokenizer, ids, options)
        responses = [response for group in groups for response in group]
        each = [n for n in range(len(prompts)) for _ in range(task.group_size)]
        rewards = rewards_of(task, [prompts[n] for n in each], responses, self._tokenizer)
        batch = pack_rollouts([ids[n] for n in each], responses, rewards, longest(self._config))
        batch = batch._replace(advantages=group_advantages(rewards, task.group_size))
        if task.kl_weight:
            reference = self._params if self._base is None else self._base
            batch = batch._replace(reference=np.asarray(self._log_probs(reference, batch)))
        return take_rows(batch, rows)

    def _numbers(self, step: int, batch_size: int) -> list[int]:
        """The prompts of a step; each epoch uses every prompt once, in a new order."""
        count = batch_size // self._config.task.group_size
        return shuffled(np.arange(step * count, (step + 1) * count), len(self._prompts), self._config.seed).tolist()


def encode_prompts(config: Config, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """Token ids of prompts, encoded as for sampling.

    Raises:
        UserError: A prompt leaves no room for a response.
    """
    ends = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    found = []
    for prompt in prompts:
        ids = np.concatenate([ends, tokenizer.encode(prompt.text)]).astype(np.int32)
        if len(ids) + config.task.response_tokens > longest(config):
            raise UserError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, which with"
                f" task.response_tokens={config.task.response_tokens} is more than {longest(config)}"
                f" (task.max_tokens, model.block_size); shorten it, or ask for shorter responses"
            )
        found.append(ids)
    return found


def sample_responses(
    config: Config, params: dict, tokenizer: Tokenizer, prompts: Sequence[np.ndarray], options: SampleConfig
) -> list[list[np.ndarray]]:
    """Token ids of responses, `[prompt][sample]`. A response that ended before the limit includes its end-of-text."""
    model = config.model
    if tokenizer.vocab_size < model.vocab_size:  # never sample ids that the tokenizer does not have
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    end = tokenizer.end_of_text
    groups = generate(model, params, prompts, options, end_of_text=end)
    ended = [] if end is None else [end]
    return [
        [np.append(ids, ended).astype(np.int32) if len(ids) < options.max_new_tokens else ids for ids in group]
        for group in groups
    ]


def rewards_of(
    task: TaskConfig, prompts: Sequence[Prompt], responses: Sequence[np.ndarray], tokenizer: Tokenizer
) -> np.ndarray:
    """Calls the user's reward function with each row and response (without end-of-text).

    Raises:
        UserError: The function returned something other than a finite number.
    """
    rewards = []
    for prompt, ids in zip(prompts, responses, strict=True):
        text = tokenizer.decode(ids[:-1] if len(ids) and ids[-1] == tokenizer.end_of_text else ids)
        reward = call_function(task.reward, "task.reward", dict(prompt.values), text, where=prompt.where)
        if not isinstance(reward, (Real, np.number, np.bool_)) or not math.isfinite(float(reward)):
            raise UserError(f"{prompt.where}: task.reward={task.reward!r} returned {reward!r}; must be a finite number")
        rewards.append(float(reward))
    return np.array(rewards)


def measure_rewards(config: Config, params: dict, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> RewardScores:
    """The mean reward of greedily decoded responses."""
    params, ids = jax.device_put(params, jax.local_devices()[0]), encode_prompts(config, tokenizer, prompts)
    options = SampleConfig(max_new_tokens=config.task.response_tokens, temperature=0.0)
    rewards, size = [], config.train.batch_size
    for first in range(0, len(prompts), size):
        groups = sample_responses(config, params, tokenizer, ids[first : first + size], options)
        chosen = prompts[first : first + size]
        rewards.append(rewards_of(config.task, chosen, [group[0] for group in groups], tokenizer))
    return RewardScores(float(np.concatenate(rewards).mean()))


def reinforce_states_loss(config: Config, _name: str) -> StatesLoss:
    """The loss of equation 3 for one update per sample. Its metrics are reward, KL divergence and length."""

    def states_loss(params: dict, x_BTD: jax.Array, batch: RolloutBatch) -> Loss:
        log_p_BT = token_log_probs(config.model, params, x_BTD, batch.targets)
        return rollout_loss(config.task.kl_weight, log_p_BT, batch)

    return states_loss


def rollout_loss(kl_weight: float, log_p_BT: jax.Array, batch: RolloutBatch) -> Loss:
    """Sums the loss of responses: the mean over their tokens of minus the advantage times the ratio of new to old
    probability, plus the weighted estimate of the KL divergence (arXiv:2402.03300, equation 4).
    """
    mask_BT = batch.targets >= 0
    count_B = jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
    ratio_BT = jnp.exp(log_p_BT - jax.lax.stop_gradient(log_p_BT))
    log_ratio_BT = jnp.where(mask_BT, batch.reference - log_p_BT, 0.0)
    kl_BT = jnp.exp(log_ratio_BT) - log_ratio_BT - 1.0 if kl_weight else jnp.zeros_like(log_p_BT)
    loss_BT = kl_weight * kl_BT - batch.advantages[:, None] * ratio_BT
    total, kl = (jnp.sum(jnp.sum(x_BT, axis=1, where=mask_BT) / count_B) for x_BT in (loss_BT, kl_BT))
    extras = {"reward": jnp.sum(batch.rewards), "response_tokens": jnp.sum(mask_BT).astype("float32")}
    extras |= {"kl": kl} if kl_weight else {}
    return Loss(total, total, jnp.float32(batch.rewards.shape[0]), extras)


def parse_prompt(row: Row, task: TaskConfig, _data: DataConfig, _labelled: bool, _counts: Counter[str]) -> Prompt:
    """See `text.labelled.ParseRow`."""
    prompt = text_field(row, task.prompt_field, "task.prompt_field")
    return Prompt(render_prompt([Message(USER, prompt)], task.template), row.values, row.where)


def _target_log_probs(model: ModelConfig, compute: Compute) -> Callable[[dict, RolloutBatch], jax.Array]:
    """Returns a function that computes log-probabilities of targets under the model without its adapter."""

    def log_probs(params: dict, batch: RolloutBatch) -> jax.Array:
        plain = {name: part for name, part in params.items() if name not in ("adapters", "prompt")}
        rows = flat(batch)
        x_BTD, _ = states_and_extras(model, plain, rows.inputs, inputs_of(model, rows), compute=compute)
        return token_log_probs(model, plain, x_BTD, batch.targets)

    return log_probs


KIND = Kind(build, reinforce_states_loss, parse_prompt, lambda example: example.text)
