"""The tool that breaks lines on purpose, on a tree of its own."""

import subprocess

import pytest

from bench import mutants
from bench.mutants import Mutant, problems, read_mutants, run_mutants, table

CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = "from code_under_test import double\n\n\ndef test_doubles():\n    assert double(3) == 6\n"
CAUGHT = Mutant("doubles once more", "code_under_test.py", "2 * x", "4 * x", ["test_code.py"])
SURVIVES = Mutant("halves twice", "code_under_test.py", "x / 2", "x / 4", ["test_code.py"])


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "code_under_test.py").write_text(CODE)
    (root / "test_code.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


@pytest.mark.slow
def test_a_mutant_is_caught_or_survives(tree, capsys):
    noticed = run_mutants(tree, [CAUGHT, SURVIVES])
    assert noticed == ["test_code.py::test_doubles", ""]
    assert "halves twice: SURVIVED" in capsys.readouterr().out
    assert table([CAUGHT, SURVIVES], noticed).endswith("2 mutants, 1 caught, 1 survived")
    assert (tree / "code_under_test.py").read_text() == CODE, "only a copy is changed"


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (
            CAUGHT._replace(was="3 * x"),
            r"'doubles once more': .*has this text 0 times, must have it once: '3 \* x'",
        ),
        (CAUGHT._replace(was="return"), "has this text 2 times"),
        (CAUGHT._replace(file="gone.py"), "there is no file gone.py"),
        (CAUGHT._replace(tests=["gone.py"]), "there is no test gone.py"),
        (CAUGHT._replace(tests=["test_code.py::test_halves"]), "there is no test test_code.py::test_halves"),
        (CAUGHT._replace(now="2 * x"), "changes nothing"),
        (CAUGHT._replace(now="2 * ("), "cannot be run"),
    ],
)
def test_a_mutant_that_does_not_fit_is_an_error(tree, mutant, message):
    with pytest.raises(SystemExit, match=message):
        run_mutants(tree, [mutant])


def test_tests_that_fail_by_themselves_prove_nothing(tree):
    (tree / "test_code.py").write_text(TESTS.replace("6", "7"))
    with pytest.raises(SystemExit, match=r"test_code.py::test_doubles fails without a mutant"):
        run_mutants(tree, [CAUGHT])


def test_the_list_has_sixty_mutants_or_more_and_fits_the_code():
    listed = read_mutants(mutants.ROOT / "bench" / "mutants.yaml")
    assert len(listed) >= 60
    assert len({mutant.breaks for mutant in listed}) == len(listed)
    assert not list(problems(mutants.ROOT, listed))
