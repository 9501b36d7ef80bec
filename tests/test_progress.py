"""What a run shows: time left, evaluations, samples."""

import pytest

from gptjax.config.train import TrainConfig
from gptjax.report import progress
from gptjax.report.cost import readable_time
from gptjax.report.progress import Progress
from gptjax.training.log import evaluations_after


class Clock:
    """A clock that tests move."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def make(evaluations: dict[int, int], batches: int = 0, num_steps: int = 10) -> Progress:
    return Progress(num_steps, 0, lambda step: evaluations[step], batches, 2, 0.0, None)


def row(step: int, **more) -> dict:
    return {
        "step": step,
        "loss": 1.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_s": 1e3,
        "skipped": 0,
    } | more


@pytest.mark.parametrize("every", [0, 1, 2, 3, 5, 6, 7])
def test_evaluations_that_are_left_are_counted(every):
    train = TrainConfig(num_steps=6, eval_every=every)
    made = [n for n in range(1, 7) if n == 6 or (every and n % every == 0)]
    for step in range(7):
        assert evaluations_after(train, step) == sum(n > step for n in made)


def test_the_time_left_has_steps_and_evaluations(clock, capsys):
    shown = make({4: 2, 10: 0})
    clock.now = 8.0
    assert shown.seconds_left(4) == 12.0, "nothing is known of evaluations"
    with shown.evaluation(4, 3) as before_batch:
        for _ in range(3):
            before_batch()
            clock.now += 10.0
    assert shown.seconds_left(4) == 12.0 + 2 * 30.0, "the evaluation does not count as steps"
    assert shown.seconds_left(10) == 0.0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 4/10 · evaluating, batch 2 of 3 · 0:32 left",  # two batches, and six steps of two seconds
        "step 4/10 · evaluating, batch 3 of 3 · 0:22 left",
    ]


def test_a_first_evaluation_is_estimated_from_its_batches(clock):
    shown = make({5: 1}, batches=60)
    clock.now = 10.0
    assert shown.seconds_left(5) == pytest.approx(10.0 + 2.0 * 60 / 2 / 3)


def test_short_evaluations_print_nothing(clock, capsys):
    shown = make({4: 1})
    with shown.evaluation(4, 100) as before_batch:
        for _ in range(100):
            before_batch()
            clock.now += 0.05
    assert capsys.readouterr().out == ""


def test_a_sample_is_printed_as_text(capsys):
    make({}).sample("def f():\n\treturn '\x1b[31m'\n")
    assert capsys.readouterr().out == "    | def f():\n    | \treturn '\ufffd[31m'\n    | \n"


@pytest.mark.parametrize("every", [0, 5, 10])
def test_a_step_is_shown_with_the_time_of_the_evaluation_that_follows_it(clock, capsys, every):
    train = TrainConfig(num_steps=10, eval_every=every)
    shown = Progress(10, 0, lambda step: evaluations_after(train, step), 60, 2, 0.0, None)
    clock.now = 10.0
    shown.step(row(5))
    shown.step(row(10))
    step, evaluation = 10.0 / 5, 10.0 / 5 * 60 / 2 / 3  # not measured yet: 60 forward passes
    found = [line.rpartition(" · ")[2] for line in capsys.readouterr().out.splitlines()]
    expected = [5 * step + evaluation * (2 if every == 5 else 1), evaluation / 2]
    assert found == [f"{readable_time(seconds)} left" for seconds in expected]
    with shown.evaluation(10, 4) as before_batch:
        for _ in range(4):
            before_batch()
            clock.now += 15.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" · ")[2] for line in lines] == ["0:45 left", "0:30 left", "0:15 left"]


def test_lines_are_not_wrapped(capsys, clock):
    shown = make({123455: 1}, num_steps=1_000_000)
    shown.step(row(123456, skipped=12345, tokens_per_s=1e9, loss=123456.7))
    shown.line("x" * 300)
    step, line = capsys.readouterr().out.splitlines()
    assert step.endswith(" left") and len(step) > 100 and line == "x" * 300
