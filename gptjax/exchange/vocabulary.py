"""A run → the same model with more or fewer tokens.

V is the old vocabulary, W the new one, D n_embd.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.checkpoints.run_dir import LoadedRun, write_run
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.tokenizers.base import Tokenizer


def write_with_vocabulary(run: LoadedRun, run_dir: Path, tokenizer: Tokenizer, rows: Sequence[np.ndarray]) -> Config:
    """Makes a run directory whose tables of tokens have the mean of old rows in each row; returns its config.

    Args:
        run: The old run.
        run_dir: Folder to make.
        tokenizer: The new tokenizer.
        rows: Old ids for each new id: one for a token that stays, those of its pieces for a new one.

    Raises:
        UserError: The run has an adapter or is compared with its base, or `run_dir` holds a run.
    """
    if run.config.model.adapter.kind != "none":
        raise UserError(f"{run_dir}: the run has an adapter; export it with --merge and import the result first")
    if run.config.task.kind in ("dpo", "reinforce"):
        raise UserError(
            f"{run_dir}: task.kind={run.config.task.kind} needs the run that it started from, with the same tokens;"
            f" change the vocabulary of {run.config.init_from}"
        )
    model = dataclasses.replace(run.config.model, vocab_size=tokenizer.vocab_size)
    params = dict(run.params)
    params["embed"] = params["embed"] | {"tokens": new_rows(params["embed"]["tokens"], rows, model.padded_vocab_size)}
    if head := params.get("head"):
        params["head"] = {name: new_rows(table, rows, model.padded_vocab_size) for name, table in head.items()}
    described = TokenizerConfig(kind="bpe", vocab_size=tokenizer.vocab_size)
    config = Config(
        run_dir=str(run_dir), model=model, tokenizer=described, task=run.config.task, parts=run.config.parts
    )
    write_run(run_dir, config, params, tokenizer)
    return config


def new_rows(table_V, rows: Sequence[np.ndarray], n_rows: int) -> np.ndarray:
    """Returns a table `[n_rows, ...]` whose first W rows are means of old ones, in float32; padding is zero."""
    old = np.asarray(table_V)
    table = np.zeros((n_rows, *old.shape[1:]), old.dtype)
    for new, ids in enumerate(rows):
        table[new] = old[ids[0]] if len(ids) == 1 else old[ids].astype(np.float32).mean(axis=0)
    return table
