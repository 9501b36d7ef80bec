"""Learning rates against the formulas of papers and against transformers; lengths in epochs."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config.optim import OptimConfig
from gptjax.config.reader import load_config
from gptjax.config.train import TrainConfig
from gptjax.errors import UserError
from gptjax.training.resolve import with_steps
from gptjax.training.schedules import make_schedule
from tests.tiny import CONFIG, replace


def rates(num_steps=40, **options):
    schedule = make_schedule(OptimConfig(learning_rate=2.0, **options), num_steps)
    return np.array([float(schedule(jnp.int32(n))) for n in range(num_steps)])


@pytest.mark.parametrize("rule", ["to_peak", "before_peak"])
def test_inverse_square_root_is_the_formula_of_the_first_transformer(rule):
    """Equation 3 of arXiv:1706.03762, whose peak is at step W; before_peak has it one step later."""
    W, step = 8 + (rule == "before_peak"), np.arange(1, 41)
    width = 1.0 / (2.0**2 * W)  # so that the peak is 2
    expected = width**-0.5 * np.minimum(step**-0.5, step * W**-1.5)
    np.testing.assert_allclose(rates(schedule="inverse_sqrt", warmup_steps=8, warmup_rule=rule), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["inverse_sqrt", "constant"])
def test_warmup_to_the_peak_is_that_of_transformers_a_step_earlier(name):
    """There the first update has a rate of 0."""
    pytest.importorskip("torch", reason="needs the extra gptjax[parity]")
    optimization = pytest.importorskip("transformers.optimization", reason="needs the extra gptjax[parity]")
    found = rates(schedule=name, warmup_steps=8, warmup_rule="to_peak")
    if name == "inverse_sqrt":
        theirs = optimization._get_inverse_sqrt_schedule_lr_lambda
        expected = [2 * theirs(n + 1, num_warmup_steps=8, timescale=8) for n in range(40)]
    else:
        theirs = optimization._get_constant_schedule_with_warmup_lr_lambda
        expected = [2 * theirs(n + 1, num_warmup_steps=8) for n in range(40)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("steps", "fraction"), [(40, 0.25), (41, 0.25)])
def test_a_fraction_is_a_number_of_steps_rounded_up(steps, fraction):
    given = {"warmup_steps": -(-steps // 4)}
    for options in ({"schedule": "linear"}, {"schedule": "cosine", "warmup_rule": "to_peak"}):
        expected = rates(steps, **options, **given)
        np.testing.assert_array_equal(rates(steps, **options, warmup_fraction=fraction), expected)


def test_cosine_after_warmup_to_the_peak_starts_at_the_peak():
    found = rates(schedule="cosine", min_learning_rate=0.2, warmup_steps=10, warmup_rule="to_peak")
    np.testing.assert_allclose(found[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    done = np.arange(30) / 30
    np.testing.assert_allclose(found[10:], 0.2 + 0.9 * (1 + np.cos(np.pi * done)), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "both set; give one"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction=1.5 must lie in \[0, 1\]"),
        ({"warmup_rule": "to_peak"}, "warmup_rule='to_peak' has no effect without"),
        ({"schedule": "inverse_sqrt"}, "decays from the end of warm-up"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 3, "min_learning_rate": 0.1}, "min_learning_rate=0.1 has no"),
        ({"schedule": "inverse_sqrt", "warmup_steps": 3, "extend": "restart"}, "extend='restart' has no effect"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        OptimConfig(learning_rate=2.0, **options)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 13), (2.0, 25), (0.08, 1), (0.01, 1)])
def test_epochs_are_as_many_steps_as_hold_their_tokens(epochs, steps):
    """Of 100 tokens, eight in a step."""
    task = types.SimpleNamespace(windows=types.SimpleNamespace(tokens_per_epoch=100), tokens_per_row=2.0)
    config = replace(CONFIG, train={"num_epochs": epochs, "num_steps": 1000, "batch_size": 4})
    found = with_steps(config, task).train
    assert (found.num_steps, found.num_epochs) == (steps, 0.0)


def test_epochs_and_steps_are_not_both_given(tmp_path):
    with pytest.raises(UserError, match=r"num_steps=7 has no effect without train.num_epochs=0"):
        TrainConfig(num_steps=7, num_epochs=1.0)
    (tmp_path / "run.yaml").write_text("train: {num_epochs: 1.5}\n")
    assert load_config(tmp_path / "run.yaml").train.num_epochs == 1.5
