"""Gradients that are not finite, spikes, NaN in checkpoints, and wrong results of the compiler."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoints.checkpoint import Checkpoints
from gptjax.checkpoints.run_dir import load_run
from gptjax.errors import UserError
from gptjax.training import selftest, trainer
from gptjax.training.guard import EXIT_DIVERGED
from gptjax.training.precision import LossScale
from gptjax.training.watch import ACCEPTED, HALTED, LOSS_SPIKE, NORM_SPIKE, NOT_FINITE, READY, WINDOW, init_watch, judge
from gptjax.training.watch import update_watch as update
from tests.faults.runs import process_config, run, write_config
from tests.tiny import (
    CONFIG,
    MODEL,
    assert_trees_equal,
    final_state,
    init_state,
    make_batch,
    replace,
    rows,
    run_config,
    train_step,
    write_corpus,
)

RARE = 7  # a token that ordinary batches do not have
HUGE = 3e38  # as its embedding: finite, but its gradient is not
EVERYTHING = replace(CONFIG, model={"tied_embeddings": False}, train={"ema": 0.9, "spike_sigma": 0.0})


def batch_without_rare_token():
    batch = make_batch()
    return batch._replace(inputs=np.where(batch.inputs == RARE, RARE + 1, batch.inputs))


def with_huge_embedding(state, size):
    tokens = state.params["embed"]["tokens"].at[RARE].set(size)
    embed = state.params["embed"] | {"tokens": tokens}
    return dataclasses.replace(state, params=state.params | {"embed": embed}, ema=state.params | {"embed": embed})


def without_counters(state):
    return state.params, state.opt_state, state.ema


@pytest.mark.fault(29, "one batch has a NaN gradient", "parameters, moments and schedule unchanged; counted")
def test_a_batch_whose_gradient_is_nan_changes_nothing(seen):
    step, good = train_step(EVERYTHING), batch_without_rare_token()
    bad = good._replace(inputs=np.full_like(good.inputs, RARE))
    start = with_huge_embedding(init_state(EVERYTHING), HUGE)
    expected, metrics = step(start, good)
    expected, _ = step(expected, good)
    state, first = step(start, good)
    state, skipped = step(state, bad)
    state, last = step(state, good)
    assert np.isnan(skipped["grad_norm"]) and skipped["verdict"] == NOT_FINITE
    assert (int(state.step), int(state.skipped), int(last["skipped"])) == (3, 1, 1)
    assert_trees_equal(without_counters(state), without_counters(expected))
    assert metrics["learning_rate"] == first["learning_rate"] and last["verdict"] == ACCEPTED
    seen("gradient norm nan: parameters, moments, average and schedule equal a run without it; counted")


@pytest.mark.fault(30, "infinite gradients (clipping would make them NaN)", "no update; counted")
def test_an_infinite_gradient_changes_nothing(seen):
    config = replace(EVERYTHING, train={"compute_dtype": "float16"})
    before = dataclasses.replace(init_state(config), loss_scale=LossScale(jnp.float32(2.0**40), jnp.int32(0)))
    state, metrics = train_step(config)(before, make_batch())
    assert not np.isfinite(metrics["grad_norm"]) and metrics["verdict"] == NOT_FINITE
    assert_trees_equal(without_counters(state), without_counters(before))
    seen(f"gradient norm {float(metrics['grad_norm'])}: no update, counted")


@pytest.mark.slow
@pytest.mark.fault(31, "every gradient is NaN from step 2 on", "stops after 10 in a row with a dump and status 3")
def test_a_run_that_diverges_stops_with_a_dump(tmp_path, seen):
    optim = {"learning_rate": 1e38, "min_learning_rate": 1e37, "warmup_steps": 0}
    config = process_config(tmp_path, optim=optim, train={"num_steps": 500, "eval_every": 0, "save_every": 5})
    done = run("train", write_config(config))
    assert done.returncode == EXIT_DIVERGED == 3, done.stderr
    lines = done.stdout.splitlines()
    assert "stopped: 10 steps in a row made no update, the last at step" in lines[-1]
    dump = json.loads((Path(config.run_dir) / "diverged.json").read_text())
    assert len(dump["skips"]) == 10
    last = dump["skips"][-1]
    assert last["reason"] == "the gradient is not finite" and len(last["documents"]) == 8
    assert len(dump["gradient_norms"]["blocks/attn/w_qkv"]) == 2
    logged = [row for row in rows(config) if "skip" in row]
    assert [row["step"] for row in logged] == [skip["step"] for skip in dump["skips"]]
    assert load_run_step(config) < last["step"]
    seen(f"status 3 after step {last['step']}: {lines[-1].partition('; see')[0]}; documents and norms are dumped")


def load_run_step(config) -> int:
    return max((int(path.name) for path in Path(config.run_dir, "checkpoints").iterdir()), default=0)


def test_after_the_limit_nothing_is_accepted_until_the_host_looks():
    config = replace(EVERYTHING, train={"max_skipped_in_a_row": 2})
    step, good = train_step(config), batch_without_rare_token()
    bad = good._replace(inputs=np.full_like(good.inputs, RARE))
    state = with_huge_embedding(init_state(config), HUGE)
    verdicts = []
    for batch in (bad, good, bad, bad, good, good):
        before, (state, metrics) = state, step(state, batch)
        verdicts.append((int(metrics["verdict"]), int(metrics["in_a_row"])))
    assert verdicts == [(1, 1), (0, 0), (1, 1), (1, 2), (HALTED, 2), (HALTED, 2)]
    assert_trees_equal(without_counters(state), without_counters(before))


@pytest.mark.slow
@pytest.mark.fault(32, "a few rows of noise after 250 ordinary steps", "no update; counted, logged with documents")
def test_a_spike_makes_no_update_and_names_its_documents(tmp_path, capsys, seen):
    # With this seed the windows of the noise, document 210 of the training split, come in steps 254, 269 and 276.
    config = run_config(
        tmp_path, seed=1, train={"num_steps": 280, "eval_every": 0, "save_every": 0, "spike_sigma": 8.0}
    )
    write_corpus(tmp_path / "corpus", 240)
    noise = np.random.default_rng(0).integers(0x4E00, 0x9FFF, 40)
    (tmp_path / "corpus" / "noise.txt").write_text("".join(map(chr, noise)), encoding="utf-8")
    config = replace(config, optim={"learning_rate": 1e-2, "min_learning_rate": 1e-2})
    assert trainer.train(config) == 0
    spikes = [row for row in rows(config) if "skip" in row]
    assert [row["step"] for row in spikes] == [254, 269, 276]
    for row in spikes:
        assert "is a spike" in row["skip"]["reason"]
        assert any(low <= 210 <= high for low, high in row["skip"]["documents"])
    assert [row for row in rows(config) if "loss" in row][-1]["skipped"] == 3
    seen(next(line for line in capsys.readouterr().out.splitlines() if "no update" in line))


def test_spikes_are_told_by_deviations_above_the_running_mean():
    watch = init_watch()
    loss, norm = jnp.float32(2.0), jnp.float32(1.0)
    generator = np.random.default_rng(0)
    losses = []
    for number in range(READY):
        if number == WINDOW:
            np.testing.assert_allclose(watch.loss_mean, np.mean(losses), rtol=1e-5)
            np.testing.assert_allclose(watch.loss_variance, np.var(losses), rtol=1e-3)
        assert judge(watch, 5.0, 10, loss * 100, norm) == ACCEPTED, "not before there are enough"
        losses.append(2.0 + 0.1 * generator.standard_normal())
        watch = update(watch, jnp.int32(ACCEPTED), jnp.bool(True), jnp.float32(losses[-1]), norm, jnp.float32(8))
    deviation = float(np.sqrt(watch.loss_variance))
    assert 0.07 < deviation < 0.13
    assert judge(watch, 5.0, 10, watch.loss_mean + 4.9 * deviation, norm) == ACCEPTED
    assert judge(watch, 5.0, 10, watch.loss_mean + 5.1 * deviation, norm) == LOSS_SPIKE
    assert judge(watch, 5.0, 10, watch.loss_mean - 100.0, norm) == ACCEPTED, "lower is no spike"
    assert judge(watch, 5.0, 10, loss, norm * 1.9) == ACCEPTED, "a steady norm's deviation counts for a fifth"
    assert judge(watch, 5.0, 10, loss, norm * 2.1) == NORM_SPIKE
    assert judge(watch, 0.0, 10, loss * 100, norm * 100) == ACCEPTED, "off"
    assert judge(watch, 0.0, 10, jnp.float32(jnp.nan), norm) == NOT_FINITE
    same = update(watch, jnp.int32(LOSS_SPIKE), jnp.bool(True), loss * 100, norm, jnp.float32(8))
    assert (same.loss_mean, same.accepted, same.in_a_row) == (watch.loss_mean, READY, 1), "a spike is not learned from"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps."""
    config = run_config(tmp_path_factory.mktemp("numbers"), train={"eval_every": 0})
    assert trainer.train(config) == 0
    return config


@pytest.mark.fault(33, "a NaN in a checkpoint's parameters or moments", "an error that names the leaf")
@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_restored_nan_is_refused(trained, tmp_path, where, seen):
    config = dataclasses.replace(trained, run_dir=str(tmp_path / "run"))
    shutil.copytree(trained.run_dir, config.run_dir)
    state, meta = final_state(config)
    broken = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(jnp.nan) if a.ndim == 3 else a, getattr(state, where))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000006")
    writer = Checkpoints(Path(config.run_dir))
    writer.save(dataclasses.replace(state, **{where: broken}), meta, None)
    writer.close()
    with pytest.raises(UserError, match="contains NaN or infinity") as error:
        trainer.train(config)
    if where == "params":
        with pytest.raises(UserError, match="blocks/attn/w_out contains NaN"):
            load_run(Path(config.run_dir), "latest")
    seen(str(error.value).partition("run, ")[2])


@pytest.mark.fault(34, "float16 gradients overflow", "the scale halves until they fit; then it trains")
def test_float16_survives_overflow(seen):
    config = replace(CONFIG, train={"compute_dtype": "float16"})
    state = dataclasses.replace(init_state(config), loss_scale=LossScale(jnp.float32(2.0**40), jnp.int32(0)))
    counts = []
    for _ in range(40):
        state, metrics = train_step(config)(state, make_batch())
        counts.append(int(metrics["skipped"]))
    assert counts[0] == 1 and counts[-1] == counts[-5] < 40 and state.watch.in_a_row == 0
    assert counts[-1] > config.train.max_skipped_in_a_row, "finding the scale does not count as steps in a row"
    assert float(metrics["loss"]) < 0.95 * np.log(MODEL.vocab_size)
    seen(f"scale 2**40 halved {counts[-1]} times to 2**{int(np.log2(float(state.loss_scale.scale)))}, then trained")


@pytest.mark.fault(35, "a batch whose targets are all masked", "loss 0 with weight 0; no NaN, no update from it")
def test_a_batch_without_targets(seen):
    batch = make_batch()._replace(targets=np.full((1, 8, MODEL.block_size), -1, np.int32))
    state, metrics = train_step(CONFIG)(init_state(CONFIG), batch)
    assert (metrics["loss"], metrics["targets"], metrics["verdict"]) == (0, 0, ACCEPTED)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert state.watch.accepted == 0
    seen("loss 0, 0 targets, all leaves finite")


@pytest.mark.fault(
    36, "a compiler that computes wrongly", "the self-test finds it; programs of that kind are compiled safely"
)
def test_wrong_fusions_are_found_and_avoided(seen):
    selftest.check()
    x_RC = np.zeros((selftest.ROWS, 3), np.float32)
    x_RC[:, 0] = np.arange(selftest.ROWS)
    eye = np.eye(3, dtype=np.float32)
    lowered = jax.jit(selftest._squared_lengths).lower(x_RC, eye)
    wrong = int(np.sum(np.asarray(lowered.compile()(x_RC, eye)) != x_RC[:, 0] ** 2))
    safe = selftest.compile_safely(lowered)
    np.testing.assert_array_equal(safe(x_RC, eye), x_RC[:, 0] ** 2)
    assert selftest.has_fusion_bug() == bool(wrong)
    step = jax.jit(lambda state, batch: train_step(CONFIG)(state, batch)).lower(init_state(CONFIG), make_batch())
    assert not selftest.is_affected(step.compile().as_text() or ""), "the step has none of them"
    seen(
        f"jaxlib {jax.lib.__version__}: {wrong} wrong sums of {selftest.ROWS:,} as it compiles by default,"
        " 0 as compile_safely does; the training step has no such fusion"
    )


@pytest.mark.parametrize("name", ["_weighted", "_attended"])
def test_a_wrong_result_stops_the_run(monkeypatch, name):
    right = getattr(selftest, name)
    monkeypatch.setattr(selftest, name, lambda *arrays: jax.tree.map(lambda x: x.at[-1].add(1.0), right(*arrays)))
    with pytest.raises(UserError, match="computes wrong numbers"):
        selftest.check()
