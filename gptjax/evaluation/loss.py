"""The loss of a trained run on text."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax

from gptjax.batches.pretraining import Batch, evaluation_batches
from gptjax.config import EvaluateConfig
from gptjax.errors import UserError
from gptjax.text.prepare import prepare
from gptjax.training.checkpoint import load_run
from gptjax.training.setup import without_segments
from gptjax.training.step import make_eval_step
