"""gptjax from Python: the same parts that the command line uses.

Shape suffixes: T token, V vocabulary, D n_embd.
"""

import dataclasses
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoints.run_dir import CONFIG_FILE, LoadedRun, load_run
from gptjax.config.model import ModelConfig
from gptjax.config.reader import from_dict, load_config, merged
from gptjax.config.run import Config
from gptjax.config.start import Start
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.embeddings import EmbeddingOptions, Pooling, embed_ids
from gptjax.exchange.runs import import_run
from gptjax.generation.sample import sample_texts
from gptjax.machine import compile_cache
from gptjax.model import gpt
from gptjax.model.gpt import Compute
from gptjax.report.progress import notify
from gptjax.tasks.registry import TASKS, parse
from gptjax.text.formats import Row
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.verbs.evaluate import one_task, predict_labels
from gptjax.verbs.sample import check_continues, in_template, load_draft, prompt_template, write_targets
from gptjax.verbs.train import run_train

WIDTHS = 64
"""Texts are padded to a multiple of this many tokens, so that few programs compile."""
Texts = str | Sequence[str]
Ids = Sequence[int] | np.ndarray


Precision = Literal["float32", "bfloat16"]


def load(
    path: str | Path, checkpoint: Literal["best", "latest"] = "best", compute_dtype: Precision = "float32"
) -> "Model":
    """Loads a trained model from a run directory, or from a Hugging Face model folder.

    Args:
        path: A run directory (it has a config.yaml) or a folder with config.json and safetensors.
        checkpoint: The one with the best evaluation, or the newest; of a run directory.
        compute_dtype: Type of matmul operands, whatever the run was trained in.

    Raises:
        UserError: It is neither, or no checkpoint there verifies.
    """
    compile_cache.start()
    folder = Path(path).expanduser()
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file():
        return Model(load_run(folder, checkpoint, notify=notify), compute_dtype)
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(temporary) / "run"
        import_run(folder, run_dir, notify=notify)
        return Model(load_run(run_dir, notify=notify), compute_dtype)


def train(config: Config | str | Path | dict, **options: Any) -> "Model":
    """Trains a run to its end, or resumes it, and returns its best model.

    Args:
        config: A `Config`, a YAML file, or nested values as a YAML file has them.
        options: Sections or fields that are laid over it: `train={"num_steps": 100}`, `run_dir="runs/mine"`.

    Raises:
        UserError: Something in the config or the data does not fit.
        RuntimeError: The run ended early, by a signal or because it diverged.
    """
    if isinstance(config, Config):
        if options:
            raise UserError("give a Config as it is, or a file or a dict together with options")
        whole = config
    elif isinstance(config, dict):
        whole = from_dict(Config, merged(config, options), "train()")
    else:
        whole = load_config(config, options)
    status = run_train(Start(whole))
    if status:
        raise RuntimeError(f"{whole.run_dir}: training ended early with status {status}")
    return load(whole.run_dir)


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained model. Texts are read as in training: after an end-of-text token, where the tokenizer has one."""

    run: LoadedRun
    """Its config, parameters, tokenizer and step."""
    compute_dtype: Precision = "float32"
    """Type of matmul operands in `logits`, `loss` and `embed`."""

    @property
    def config(self) -> Config:
        """The config of the run."""
        return self.run.config

    @property
    def params(self) -> dict:
        """Parameters, a nested dict of arrays."""
        return self.run.params

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer.

        Raises:
            UserError: It has none.
        """
        if self.run.tokenizer is None:
            raise UserError("this model has no tokenizer: import it again with --tokenizer, or give token ids")
        return self.run.tokenizer

    def tokens(self, text: str) -> np.ndarray:
        """The ids of a text, int32 `[T]`, with the end-of-text token that stands before it."""
        start = [] if self.tokenizer.end_of_text is None else [self.tokenizer.end_of_text]
        return np.concatenate([np.array(start, np.int32), self.tokenizer.encode(text)])

    def logits(self, texts: Texts | Ids) -> np.ndarray | list[np.ndarray]:
        """Float32 logits `[T, V]` of the token after each one, or of what the run's objective predicts there; of
        several texts a list.

        Raises:
            UserError: A text is longer than the context, or empty.
        """
        one, rows = self._rows(texts)
        found = [logits_BTV[0, : len(ids)] for ids, logits_BTV in self._each(_logits, rows)]
        return found[0] if one else found

    def embed(
        self, texts: Texts | Ids, pooling: Pooling = "mean", normalized: bool = False, layer: int = -1
    ) -> np.ndarray:
        """One float32 vector for each text: its hidden states, pooled. `[D]`, of several texts `[N, D]`.

        Args:
            texts: None longer than the context.
            pooling: The mean over a text's positions, or the last one.
            normalized: Make vectors of length 1.
            layer: Hidden states after this many blocks, 0: the token embeddings; -1: after all blocks and the final
                norm.

        Raises:
            UserError: A text is longer than the context, or the model has no such layer.
        """
        one, rows = self._rows(texts)
        options, compute = EmbeddingOptions(layer, pooling, normalized), Compute(self.compute_dtype, unroll=1)
        vectors_ND = embed_ids(self.config.model, self.params, rows, options, compute)
        return vectors_ND[0] if one else vectors_ND

    def loss(self, texts: Texts | Ids) -> float | list[float]:
        """Mean negative log-likelihood of the tokens of each text in nats, the first token left out.

        Raises:
            UserError: The run does not predict the next token.
        """
        check_continues(self.config, "this run")
        one, rows = self._rows(texts)
        found = []
        for ids, logits_BTV in self._each(_logits, rows):
            if len(ids) < 2:
                raise UserError("a text of one token has no token to predict")
            logits_TV = logits_BTV[0, : len(ids) - 1].astype(np.float64)
            largest_T = logits_TV.max(-1)
            log_z_T = np.log(np.exp(logits_TV - largest_T[:, None]).sum(-1)) + largest_T
            found.append(math.fsum(log_z_T - logits_TV[np.arange(len(ids) - 1), ids[1:]]) / (len(ids) - 1))
        return found[0] if one else found

    def generate(self, prompts: Texts, **options: Any) -> list[list[str]]:
        """Continuations of each prompt, `[prompt][sample]`, without the prompt.

        A run with task.kind=instruct reads each prompt as the user's message in its template, unless `raw` is true.

        Args:
            prompts: Texts, none empty.
            options: Those of `gptjax sample`: `max_new_tokens`, `temperature`, `top_p`, `num_samples`, `seed`, …

        Raises:
            UserError: An option or a prompt is wrong.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        check_continues(self.config, "this run")
        config = from_dict(SampleConfig, options, "generate()")
        if self.config.model.encoder_layers:
            return [[text] for text in write_targets(self.run, self.tokenizer, prompts, config)]
        template = prompt_template(self.run, config.raw, "this run")
        prompts, at_start = in_template(prompts, template), template is not None
        return sample_texts(
            *(self.config.model, self.params, self.tokenizer, prompts, config),
            at_start=at_start,
            prefix=self.config.task.objective.kind == "prefix",
            draft=load_draft(config, self.tokenizer),
            notify=notify,
        )

    def predict(self, texts: Texts | Sequence[dict[str, Any]], part: str = "") -> list[dict[str, Any]]:
        """Predictions of a run with a head for texts: `{"predicted": …, "probabilities": {label: p}}` each.

        Args:
            texts: Texts, or rows with the fields of the run's training data: of pairs and candidates.
            part: Name of the task, of a run that learned several.

        Raises:
            UserError: The run predicts nothing, or a row is wrong.
        """
        run, name = one_task(self.run, part, "this run")
        kind = TASKS[run.config.task.kind]
        if kind.predict is None or kind.outputs is None:
            raise UserError(f"this run has task.kind={run.config.task.kind}; predict needs a task with a head")
        rows = [texts] if isinstance(texts, str) else list(texts)
        values = [{run.config.data.text_field: row} if isinstance(row, str) else row for row in rows]
        numbered = (Row(value, f"text {number}") for number, value in enumerate(values, 1))
        examples = list(parse(numbered, run.config.task, run.config.data, labelled=False))
        found, _ = predict_labels(run, name, examples, min(16, len(rows)))
        return list(kind.outputs(found))

    def _rows(self, texts: Texts | Ids) -> tuple[bool, list[np.ndarray]]:
        """Whether a single text was given, and the ids of each."""
        if self.config.model.encoder_layers:
            raise UserError("model.encoder_layers: logits and states need a source and a target; use generate")
        if isinstance(texts, str):
            return True, [self._checked(self.tokens(texts))]
        if isinstance(texts, np.ndarray) or (len(texts) and isinstance(texts[0], (int, np.integer))):
            return True, [self._checked(np.asarray(texts, np.int32))]
        return False, [self._checked(self.tokens(text)) for text in texts]  # pyright: ignore[reportArgumentType]

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        model = self.config.model
        if not 1 <= len(ids) <= model.block_size:
            raise UserError(f"a text has {len(ids)} tokens, must have 1 to model.block_size={model.block_size}")
        if ids.min() < 0 or ids.max() >= model.vocab_size:
            raise UserError(f"a token lies outside of model.vocab_size={model.vocab_size}")
        return ids

    def _each(self, function, rows: list[np.ndarray]):
        """Yields ids and what a compiled function makes of them, padded at their end."""
        model, compute = self.config.model, Compute(self.compute_dtype, unroll=1)
        for ids in rows:
            width = min(model.block_size, -(-len(ids) // WIDTHS) * WIDTHS)
            if model.bidirectional:  # it would attend to padding
                width = len(ids)
            tokens_1T = np.zeros((1, width), np.int32)
            tokens_1T[0, : len(ids)] = ids
            yield ids, np.asarray(function(model, compute, self.params, tokens_1T))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(model: ModelConfig, compute: Compute, params: dict, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    x_BTD = gpt.hidden_states(model, params, tokens_BT, positions_BT, compute=compute)
    return gpt.logits(model, params, x_BTD)
