"""`gptjax doctor`: its description of a machine, and detection of damage."""

from pathlib import Path

import pytest

from gptjax.cli import main
from gptjax.config.reader import to_yaml
from tests.faults.inputs import make_run
from tests.tiny import run_config


@pytest.fixture
def prepared(tmp_path, capsys):
    config = run_config(tmp_path, cache_dir=str(tmp_path / "cache"))
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert main(["prepare", str(path)]) == 0
    return path, Path(capsys.readouterr().out.splitlines()[-1]), ["--cache_dir", config.cache_dir]


def doctor(capsys, *args: object) -> tuple[int, str]:
    status = main(["doctor", *map(str, args)])
    return status, capsys.readouterr().out


def test_the_machine_is_described_without_any_argument(prepared, capsys):
    status, report = doctor(capsys, *prepared[2])
    assert status == 0
    for heading in (
        "gptjax",
        "machine",
        "libraries",
        "devices",
        "allocator",
        "kernels",
        "compiled",
        "prepared",
        "disk",
    ):
        assert f"\n{heading} " in f"\n{report}"
    assert "1 data sets" in report and "verdict" not in report


def test_data_is_verified_by_config_by_folder_and_in_the_cache(prepared, capsys):
    config, folder, cache = prepared
    shard = folder / "train-00000.bin"
    for args in ([config], [folder], ["--all_data", "true"], [config, folder]):
        status, report = doctor(capsys, *args, *cache)
        assert status == 0 and "tokens, 2 shards" in report and "good" in report
    content = bytearray(shard.read_bytes())
    content[-3] ^= 16
    shard.write_bytes(content)
    for args in ([config], [folder], ["--all_data", "true"]):
        status, report = doctor(capsys, *args, *cache)
        assert status == 1 and f"DAMAGED     {shard}: damaged" in report and "verdict     1 of 1 damaged" in report


def test_a_config_without_prepared_data_is_not_damaged(tmp_path, capsys):
    config = run_config(tmp_path, cache_dir=str(tmp_path / "nothing"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    status, report = doctor(capsys, tmp_path / "c.yaml", "--cache_dir", tmp_path / "nothing")
    assert status == 0 and "not prepared yet" in report


def test_other_paths_are_an_error_that_names_them(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "nowhere"):
        assert main(["doctor", str(place)]) == 2
        assert f"{place}: neither a config file" in capsys.readouterr().err


def test_a_run_is_verified_with_its_checkpoints_and_its_data(prepared, tmp_path, capsys):
    config, _, cache = prepared
    run_dir = make_run(tmp_path / "run")
    model = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(
        model[: model.index("data:")] + config.read_text()[config.read_text().index("data:") :]
    )
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text().replace("~/.cache/gptjax", cache[1]))
    status, report = doctor(capsys, run_dir, *cache)
    assert status == 0
    assert "config.yaml, tokenizer.json" in report and "step 0, " in report and "tokens, 2 shards" in report
    assert "verdict     all 3 good" in report
    array = max((run_dir / "checkpoints").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    (run_dir / "tokenizer.json").write_text((run_dir / "tokenizer.json").read_text().replace("bytes", "chars"))
    status, report = doctor(capsys, run_dir, *cache)
    assert status == 1 and "verdict     2 of 3 damaged" in report
    assert f"{array.name} does not match its checksum" in report and "tokenizer.json: not a valid tokenizer" in report
