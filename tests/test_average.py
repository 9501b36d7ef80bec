"""Parameters averaged over checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.checkpoints.run_dir import load_run, write_run
from gptjax.config.run import Config
from gptjax.config.verbs.exchange import ExportConfig
from gptjax.errors import UserError
from gptjax.exchange.hf_model import import_model
from gptjax.exchange.runs import export_run
from tests.tiny import MODEL, init_params


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with three checkpoints, of which the last two have twice and seven times the parameters of the first."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder / "run", Config(model=MODEL), init_params(MODEL, jax.random.key(0)), None)
    checkpoints = Checkpoints(folder / "run", 3, notify=lambda message: None)
    for step, factor in ((1, 2.0), (2, 7.0)):
        params = jax.tree.map(lambda p, factor=factor: p * jnp.float32(factor), init_params(MODEL, jax.random.key(0)))
        checkpoints.save_items(step, {"params": params}, {}, None)
    checkpoints.close()
    return folder / "run"


def test_parameters_are_the_mean_of_the_newest_checkpoints(run_dir, tmp_path):
    first = init_params(MODEL, jax.random.key(0))
    for count, factor in ((2, 4.5), (3, 10 / 3)):
        found = load_run(run_dir, "latest", average=count)
        assert found.step == 2
        jax.tree.map(lambda a, b, f=factor: np.testing.assert_allclose(a, f * b, rtol=1e-6), found.params, first)
    export_run(run_dir, ExportConfig(to=str(tmp_path / "hf"), checkpoint="latest", average=2))
    exported = import_model(tmp_path / "hf").params["embed"]["tokens"]
    np.testing.assert_allclose(exported, 4.5 * first["embed"]["tokens"], rtol=1e-6)


def test_too_few_checkpoints_and_the_best_one_are_errors(run_dir):
    with pytest.raises(UserError, match="average=4 needs as many checkpoints, 3 verify"):
        load_run(run_dir, "latest", average=4)
    with pytest.raises(UserError, match="average=2 has no effect without checkpoint=latest"):
        ExportConfig(to="x", average=2)
