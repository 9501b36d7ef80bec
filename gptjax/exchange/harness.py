"""gptjax models in EleutherAI's lm-evaluation-harness.

    python -m gptjax.exchange.harness run --model gptjax --model_args run_dir=RUN --tasks hellaswag

takes the arguments of the program `lm_eval`. lm_eval has no plugin mechanism, so this module adds the model "gptjax" to
its registry and calls it. In Python: `register()`, then `lm_eval.simple_evaluate(model="gptjax",
model_args="run_dir=RUN", ...)`.
"""

import functools
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError, one_line
from gptjax.evaluation.continuations import generate_until
from gptjax.evaluation.likelihood import check_likelihood, encode_pair, make_scorer, pair_span, score_spans
from gptjax.machine import compile_cache
from gptjax.model.gpt import Compute

LONGEST_ANSWER = 256
"""Largest number of generated tokens if the task sets no limit; the default of lm_eval's own models."""


def register() -> None:
    """Registers the model "gptjax" in lm_eval.

    Raises:
        UserError: lm_eval is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise UserError(f"the harness needs {error.name}, of the extra lm-eval: pip install -e '.[lm-eval]'") from None
    if "gptjax" not in model_registry:
        model_registry.register("gptjax", target=model_class())


@functools.cache
def model_class() -> type:
    """The model class. It is defined in a function because its base class needs lm_eval."""
    from lm_eval import utils
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs

    class GptjaxLM(LM):
        """A run that answers the three kinds of requests of lm_eval."""

        def __init__(
            self,
            run_dir: str,
            checkpoint: str = "best",
            dtype: str = "float32",
            batch_size: int | str = 16,
            **ignored: Any,  # lm_eval passes device and max_batch_size to every model
        ):
            super().__init__()
            if unknown := set(ignored) - {"device", "max_batch_size"}:
                raise UserError(f"model_args: unknown {', '.join(sorted(unknown))}; known: run_dir, checkpoint, dtype")
            if checkpoint not in ("best", "latest"):
                raise UserError(f"model_args: checkpoint={checkpoint!r} must be best or latest")
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise UserError(f"batch_size={batch_size!r} must be a whole number from 1")
            compile_cache.start()
            run = load_run(Path(run_dir).expanduser(), checkpoint)
            if run.tokenizer is None:
                raise UserError(f"{run_dir}: has no tokenizer, so no text can be measured")
            check_likelihood(run.config, run_dir)
            self.model, self.params, self.coder = run.config.model, run.params, run.tokenizer
            self.rows = int(batch_size)
            self.dtype: Literal["float32", "bfloat16"] = _dtype(dtype)
            self._scorer = make_scorer(self.model, Compute(self.dtype, unroll=run.config.train.unroll))
            self._sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        @property
        def tokenizer_name(self) -> str:
            return f"gptjax-{self.coder.fingerprint}"

        def loglikelihood(self, requests, disable_tqdm: bool = False):
            pairs = [request.args for request in requests]
            block_size = self.model.block_size
            found = self._scores([pair_span(*encode_pair(self.coder, *pair), block_size) for pair in pairs])
            for pair, answer in zip(pairs, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", pair, answer)
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
            if self.coder.end_of_text is None:
                raise UserError("loglikelihood_rolling needs a tokenizer with end-of-text, which this run's has not")
            spans, counts = [], []
            block_size = self.model.block_size
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    token_list=self.coder.encode(request.args[0]).tolist(),
                    prefix_token=self.coder.end_of_text,
                    max_seq_len=block_size,
                    context_len=1,
                )
                pairs = [utils.make_disjoint_window(window) for window in windows]
                spans += [pair_span(np.array(before), np.array(after), block_size) for before, after in pairs]
                counts.append(len(pairs))
            sums, found = iter(score for score, _ in self._scores(spans)), []
            for request, count in zip(requests, counts, strict=True):
                found.append(sum(next(sums) for _ in range(count)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
            return found

        def generate_until(self, requests, disable_tqdm: bool = False):
            found = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for number, request in enumerate(requests):
                groups.setdefault(repr(request.args[1]), []).append(number)
            for numbers in groups.values():
                asked = normalize_gen_kwargs(requests[numbers[0]].args[1], LONGEST_ANSWER)
                texts = self._generate([requests[number].args[0] for number in numbers], dict(asked))
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
            return found

        def _scores(self, spans) -> list[tuple[float, bool]]:
            scores = score_spans(self._scorer, self.params, spans, self.model.block_size, self.rows, self._sharding)
            return [(score.log_probability, score.greedy) for score in scores]

        def _generate(self, contexts: list[str], asked: dict[str, Any]) -> list[str]:
            new, stop = asked.pop("max_gen_toks"), tuple(text for text in asked.pop("until") if text)
            temperature = float(asked.pop("temperature", 0.0)) if asked.pop("do_sample", False) else 0.0
            chosen = {name: asked.pop(name) for name in ("top_k", "top_p") if name in asked and temperature}
            if unknown := set(asked) - {"top_k", "top_p"}:
                raise UserError(f"gen_kwargs: unknown {', '.join(sorted(unknown))}; a gptjax model knows do_sample,"
                                " temperature, top_k, top_p, until and max_gen_toks")  # fmt: skip
            if self.model.block_size <= new:
                raise UserError(
                    f"max_gen_toks={new} must be less than model.block_size={self.model.block_size}, so that a context"
                    " fits; set it with --gen_kwargs max_gen_toks=N"
                )
            end = self.coder.end_of_text
            encoded = [self.coder.encode(context)[-(self.model.block_size - new) :] for context in contexts]
            if not all(map(len, encoded)) and end is None:
                raise UserError("an empty context needs a tokenizer with end-of-text, which this run's has not")
            prompts = [ids if len(ids) else np.array([end], np.int32) for ids in encoded]
            options = SampleConfig(
                max_new_tokens=new, stop=stop, temperature=temperature, compute_dtype=self.dtype, **chosen
            )
            return generate_until(self.model, self.params, self.coder, prompts, options, self.rows)

    return GptjaxLM


def _dtype(name: str) -> Literal["float32", "bfloat16"]:
    if name != "float32" and name != "bfloat16":
        raise UserError(f"model_args: dtype={name!r} must be float32 or bfloat16")
    return name


def main() -> int:
    """Runs lm_eval's command line; a user error prints one line and returns status 2."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"gptjax: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
