"""Numbers by layer: those of the step and of activations are those of NumPy, and they reach file, report and sinks."""

import jax
import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config.run import FinetuneConfig
from gptjax.errors import UserError
from gptjax.evaluation.inside import layer_statistics
from gptjax.report import html
from gptjax.report.charts import heat_maps_of
from gptjax.report.metrics import read_metrics
from gptjax.report.record import read_record
from gptjax.report.sinks import values_of
from gptjax.training import trainer
from gptjax.training.by_layer import group_names
from gptjax.training.step import make_gradient
from tests.test_report import Page
from tests.tiny import CONFIG, MODEL, init_params, init_state, make_batch, replace, run_config, train_step

GROUPS = ("embed", "layer_0", "layer_1", "norm_f")


def norms(tree: dict) -> list[float]:
    """Of the parameters of the small model, in the order of `GROUPS`."""
    blocks = [np.asarray(leaf) for leaf in jax.tree.leaves(tree["blocks"])]
    parts = [jax.tree.leaves(tree["embed"]), *([leaf[n] for leaf in blocks] for n in range(2))]
    return [sum(float((np.asarray(x) ** 2).sum()) for x in part) ** 0.5 for part in [*parts, tree["norm_f"].values()]]


def test_norms_and_ratios_of_logged_steps_are_those_of_numpy():
    config = replace(CONFIG, log={"by_layer": True}, train={"log_every": 3})
    state, batch = init_state(CONFIG), make_batch()
    assert group_names(state.params, 2) == GROUPS
    _, grads = jax.jit(make_gradient(CONFIG))(state, batch)
    changed, metrics = train_step(config)(state, batch)
    changes = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), changed.params, state.params)
    np.testing.assert_allclose(metrics["by_layer"]["grad_norm"], norms(grads), rtol=1e-5)
    expected = np.divide(norms(changes), norms(state.params))
    # Weights are near 1 in size and updates near 1e-3, so differences of float32 keep four digits.
    np.testing.assert_allclose(metrics["by_layer"]["update_ratio"], expected, rtol=1e-3)
    second, metrics = train_step(config)(changed, batch)
    assert np.isnan(metrics["by_layer"]["grad_norm"]).all(), "step 2 is not logged"
    assert np.isfinite(train_step(config)(second, batch)[1]["by_layer"]["grad_norm"]).all()


def test_the_top_layers_keep_their_numbers():
    params = {"blocks": {"w": np.zeros((2, 3))}, "heads": {"classify": {"w": np.zeros(2)}}}
    assert group_names(params, 12) == ("layer_10", "layer_11", "heads")


def test_activations_are_those_of_numpy():
    params = jax.tree.map(np.array, init_params(MODEL, jax.random.key(0)))
    params["blocks"]["attn"]["w_qkv"][:] = 0.0  # so that attention is uniform
    tokens = np.arange(12) % 7
    found = layer_statistics(MODEL, params, tokens)
    stream = params["embed"]["tokens"][tokens] + params["embed"]["positions"][:12]
    assert found["residual_rms"]["embed"] == pytest.approx(float(np.sqrt((stream**2).mean())), rel=1e-5)
    uniform = np.log(np.arange(1, 13)).mean()
    for name in ("attention_entropy", "attention_entropy_min"):
        assert found[name] == pytest.approx({"layer_0": uniform, "layer_1": uniform}, rel=1e-5)


def test_a_run_writes_them_and_the_report_draws_them(tmp_path):
    steps = {"num_steps": 3, "log_every": 2, "eval_every": 0, "save_every": 0, "eval_windows": 4, "batch_size": 4}
    config = run_config(tmp_path, train=steps, log={"by_layer": True, "activations": True})
    assert trainer.train(config) == 0
    run = tmp_path / "run"
    sizes = read_record(run).facts["data"]
    assert [row["split"] for row in sizes] == ["train", "validation"]
    assert sum(row["documents"] for row in sizes) == 40
    assert sum(row["bytes"] for row in sizes) == sum(p.stat().st_size for p in (tmp_path / "corpus").iterdir())
    rows = [row for row in read_metrics(run) if "by_layer" in row]
    assert [(row["step"], *row["by_layer"]) for row in rows] == [
        *((step, "grad_norm", "update_ratio") for step in (1, 2, 3)),
        (3, "residual_rms", "attention_entropy", "attention_entropy_min"),
    ]
    sent = values_of(rows[0])
    assert sent["grad_norm/layer_1"] == rows[0]["by_layer"]["grad_norm"]["layer_1"] > 0
    assert set(sent) == {f"{kind}/{group}" for kind in ("grad_norm", "update_ratio") for group in GROUPS}
    maps = heat_maps_of([read_record(run)])
    assert maps[0].steps == [1, 2, 3] and maps[0].rows == GROUPS
    assert maps[0].values[2][1] == pytest.approx(rows[1]["by_layer"]["grad_norm"]["layer_1"], rel=1e-5)
    page = Page(html.render([read_record(run)]))
    assert [heat["title"] for heat in page.data["heat_maps"]][:2] == ["Gradient norm by layer", "Update by layer"]
    pytest.importorskip("matplotlib", reason="needs the extra report")
    assert main(["report", str(run), "--png", str(tmp_path / "figures")]) == 0
    assert {"grad_norm_by_layer.png", "residual_rms_by_layer.png"} <= {p.name for p in (tmp_path / "figures").iterdir()}


def test_activations_are_refused_where_a_text_is_not_continued():
    with pytest.raises(UserError, match=r"log.activations=True has no effect without pretraining"):
        replace(CONFIG, log={"activations": True}, task={"kind": "classify"}, finetune=FinetuneConfig().__dict__)
