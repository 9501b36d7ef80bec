"""The served run: its engine for decoding, its embeddings and its labels."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun
from gptjax.config.run import Config
from gptjax.config.task import LABELLED
from gptjax.config.verbs.sample import SampleConfig
from gptjax.config.verbs.serve import ServeConfig
from gptjax.errors import UserError, did_you_mean
from gptjax.evaluation.embeddings import BATCH, EmbeddingOptions, embed_decoding, embed_ids
from gptjax.generation.constraint import Form, constrainer_of
from gptjax.generation.request import check_prompts
from gptjax.generation.slots import Row, check_options, fits
from gptjax.model.gpt import Compute
from gptjax.serving.chat_format import ChatFormat, chat_format
from gptjax.serving.conversation import for_texts
from gptjax.serving.engine import Engine, QueueFull
from gptjax.serving.metrics import Metrics
from gptjax.serving.protocol import Invalid
from gptjax.tasks.multi import parts_of
from gptjax.tasks.registry import TASKS, parse
from gptjax.text.formats import Row as DataRow
from gptjax.training.step import compute_options


class Service:
    """A served run. `engine` is None for runs that label texts."""

    def __init__(self, run: LoadedRun, name: str, config: ServeConfig):
        """See the class.

        Raises:
            UserError: The run has no tokenizer, it learned something else than labels or to write text, an option has
                no effect, or a package is missing.
        """
        if run.tokenizer is None:
            raise UserError("the run has no tokenizer; import the model again with --tokenizer gpt2")
        if config.max_prompt_tokens > run.config.model.block_size:
            raise UserError(
                f"max_prompt_tokens={config.max_prompt_tokens} has no effect: it is more than"
                f" model.block_size={run.config.model.block_size}; lower it, or leave it out"
            )
        self.run, self.name, self.tokenizer, self.created = run, name, run.tokenizer, int(time.time())
        self.metrics, self._config = Metrics(), config
        self._parts = parts_of(run.config)
        self.labels = any(part.task.kind in LABELLED for part in self._parts.values())
        self.chat_format: ChatFormat | None = None if self.labels else chat_format(run)
        self.engine: Engine | None = None
        if not self.labels:
            options = SampleConfig(compute_dtype=config.compute_dtype, quantize=config.quantize)
            model = for_texts(run, options, config.slots)
            self._model = model
            self.run = dataclasses.replace(run, params={})  # the engine has the only copy
            self.engine = Engine(model, config.slots, config.max_queue, self.metrics)
        self._executor = ThreadPoolExecutor(
            1, thread_name_prefix="labels"
        )  # one worker, because each computation uses all cores
        self._computing = 0
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts to accept requests."""
        if self.engine is not None:
            self.engine.start()

    def close(self) -> None:
        """Finishes running requests and stops."""
        if self.engine is not None:
            self.engine.close()
        self._executor.shutdown()

    def description(self) -> dict[str, Any]:
        """The model's entry in `/v1/models`."""
        model = self.run.config.model
        return {
            **{"id": self.name, "object": "model", "created": self.created, "owned_by": "gptjax"},
            **{"context_length": model.block_size, "vocab_size": self.tokenizer.vocab_size, "step": self.run.step},
            "endpoints": self._endpoints(),
        }

    def _endpoints(self) -> list[str]:
        if self.labels:
            return ["classify", "embeddings"]
        return ["completions", *(["chat/completions"] if self.chat_format else []), "embeddings"]

    def constrain(self, rows: Sequence[Row], form: Form, before: str) -> None:
        """Constrains the rows to texts of a form, which follow the text `before`.

        Raises:
            UserError: The form is malformed, or llguidance is missing.
        """
        with self._lock:
            constrainer = constrainer_of(self.tokenizer)
        constrainer.check(form, before)
        for row in rows:
            row.constraint = constrainer.make(form, before)

    def check(self, row: Row) -> None:
        """Checks that a sequence can be decoded.

        Raises:
            Invalid: It is too long, or an option is not supported.
        """
        block_size, length = self.run.config.model.block_size, len(row.prompt)
        most = min(block_size, self._config.max_prompt_tokens or block_size)
        if length > most:
            message = f"the prompt has {length:,} tokens, must have at most {most:,}"
            raise Invalid(message, "prompt", "context_length_exceeded")
        new = 0 if row.score_only else row.options.max_new_tokens
        if not fits(self._model.config, length, new):
            message = (
                f"the prompt has {length:,} tokens, and {new:,} new ones do not fit in a context of {block_size:,}"
            )
            raise Invalid(message, "max_tokens", "context_length_exceeded")
        try:
            check_prompts(self._model.config, [row.prompt], row.options)
            check_options(row.options)
        except UserError as error:
            raise Invalid(str(error)) from None

    async def compute(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a function on the worker thread, outside the event loop.

        Raises:
            QueueFull: Too many calls are waiting.
        """
        if self._computing > self._config.max_queue:
            raise QueueFull
        self._computing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)
        finally:
            self._computing -= 1

    def check_text(self, number: int, ids: np.ndarray) -> None:
        """Checks that an input fits in the context.

        Raises:
            Invalid: It does not.
        """
        most = self.run.config.model.block_size
        if len(ids) > most:
            message = f"input {number} has {len(ids):,} tokens, must have at most {most:,}"
            raise Invalid(message, "input", "context_length_exceeded")

    def embed(self, texts: Sequence[np.ndarray], options: EmbeddingOptions) -> np.ndarray:
        """Embeddings of texts given as token ids, float32 `[texts, n_embd]`."""
        if self.engine is not None:
            return embed_decoding(self._model, texts, options)
        compute = Compute(self._config.compute_dtype, unroll=1)
        return embed_ids(self.run.config.model, self.run.params, texts, options, compute)

    def head(self, part: str) -> tuple[str, Config]:
        """The name of the classification head, and its config.

        Raises:
            Invalid: The run does not classify texts, or has several heads and `part` names none of them.
        """
        parts = {name: config for name, config in self._parts.items() if config.task.kind == "classify"}
        if not parts:
            raise Invalid("this run classifies no texts", code="no_labels")
        if part not in parts and (part or len(parts) > 1):
            raise Invalid(f"part={part!r} must be one of {', '.join(parts)}.{did_you_mean(part, parts)}", "part")
        name = part or next(iter(parts))
        return name, parts[name]

    def classify(self, texts: Sequence[str], name: str, config: Config) -> list[dict[str, Any]]:
        """Predicted labels of texts, the probabilities of all labels, and whether a text was cut."""
        rows = (DataRow({config.data.text_field: text}, "input") for text in texts)
        examples = list(parse(rows, config.task, config.data, labelled=False))
        predict = TASKS["classify"].predict
        assert predict is not None  # `head` returns only heads that predict labels
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        found, _ = predict(
            *(config, name, self.run.params, self.tokenizer, examples, BATCH if len(examples) > 1 else 1),
            *(compute_options(config), device),
        )
        several = found.targets.ndim == 2
        return [
            {
                "predicted": [found.labels[n] for n in np.flatnonzero(chosen)]
                if several
                else found.labels[int(chosen)],
                "probabilities": {
                    label: round(float(p), 6) for label, p in zip(found.labels, probabilities, strict=True)
                },
                "cut": bool(cut),
            }
            for chosen, probabilities, cut in zip(found.chosen, found.probabilities_EN, found.cut, strict=True)
        ]
