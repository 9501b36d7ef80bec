import ast
import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest

from gptjax import cli
from gptjax.config import synonyms
from gptjax.config.model import ModelConfig
from gptjax.config.reader import differing_fields, flag_types, from_dict, load_config, read_flags, to_dict, to_yaml
from gptjax.config.run import Config
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(CONFIGS.glob("*.yaml"))


def load(tmp_path, text: str, *flags: str) -> Config:
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, read_flags(Config, flags))


def test_yaml_reads_back_what_was_written(tmp_path):
    config = load(tmp_path, "model: {n_layer: 3}\ndata: {path: [a, 'b c']}\noptim: {learning_rate: 1e-3}")
    assert load(tmp_path, to_yaml(config)) == config
    assert from_dict(Config, to_dict(config), "x") == config
    assert config.optim.learning_rate == 1e-3


def test_flags_win_over_the_file(tmp_path):
    config = load(
        tmp_path, "seed: 1\nmodel: {n_layer: 3}", "--model.n_layer", "5", "--model.bias=false", "--data.path", "a", "b"
    )
    assert (config.seed, config.model.n_layer, config.model.bias, config.data.path) == (1, 5, False, ("a", "b"))


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("model: {n_layers: 4}", (), r"tiny.yaml: unknown key 'model.n_layers' .*Did you mean 'n_layer'\?"),
        ("n_layer: 4", (), r"unknown key 'n_layer'.*Did you mean 'model.n_layer'\?"),
        ("modell: {}", (), r"unknown key 'modell'.*Did you mean 'model'\?"),
        ("model: 4", (), "model is a section of keys, not 4"),
        ("- a", (), "must hold `key: value` lines, not a list"),
        ("seed: 1\nseed: 2", (), "key 'seed' is given twice"),
        ("seed: !!python/object/apply:os.system ['true']", (), "not valid YAML"),
        ("seed: [", (), "not valid YAML"),
        ("model: {n_layer: four}", (), "model.n_layer='four' must be a whole number"),
        ("model: {n_layer: 1.5}", (), "model.n_layer=1.5 must be a whole number"),
        ("model: {n_layer: true}", (), "model.n_layer=True must be a whole number"),
        ("model: {bias: 1}", (), "model.bias=1 must be true or false"),
        ("run_dir: 7", (), "run_dir=7 must be text"),
        ("optim: {learning_rate: .nan}", (), "optim.learning_rate=nan must be a number"),
        ("optim: {learning_rate: fast}", (), "optim.learning_rate='fast' must be a number"),
        ("model: {n_embd: 10, n_head: 3}", (), "model.n_embd=10 must be divisible by model.n_head=3; the nearest .* 9"),
        ("model: {n_head: 4, n_embd: 8, n_kv_head: 3}", (), "must be divisible by model.n_kv_head=3"),
        ("train: {num_steps: 0}", (), "train.num_steps=0 must be at least 1"),
        ("train: {num_steps: 99999999999999999999}", (), "is too large"),
        ("train: {batch_size: 8, micro_batch_size: 3}", (), "must be divisible by train.micro_batch_size=3"),
        ("train: {compute_dtype: bfloat}", (), r"must be one of .*Did you mean 'bfloat16'\?"),
        ("tokenizer: {name: gpt3}", (), r"tokenizer.name='gpt3' must be one of .*Did you mean 'gpt2'\?"),
        ("tokenizer: {kind: bytes, vocab_size: 300}", (), "tokenizer.vocab_size=300 has no effect without"),
        ("optim: {wsd_decay_fraction: 0.5}", (), "has no effect without optim.schedule=wsd"),
        ("optim: {extended: [at 3]}", (), "optim.extended: 'at 3' must be like 'continue at 1000 of 1000'"),
        ("optim: {schedule: constant, extend: restart}", (), "optim.extend='restart' has no effect without"),
        ("train: {best_by: accuracy}", (), "train.best_by='accuracy' has no effect without a task"),
        ("task: {kind: classify}\ntrain: {best_by: span_f1}", (), "train.best_by='span_f1' has no effect without"),
        ("data: {path: a, source: python-stdlib}", (), "data.path and data.source are both set"),
        ("model: {dropout: 1}", (), r"model.dropout=1.0 must lie in \[0, 1\)"),
        ("mesh: {data: -1, fsdp: -1}", (), "only one axis may be -1"),
        ("", ("--model.n_layers", "4"), r"unknown option --model.n_layers. Did you mean 'model.n_layer'\?"),
        ("", ("--n_layer", "4"), r"unknown option --n_layer. Did you mean 'model.n_layer'\?"),
        ("", ("--model.n_layer",), "--model.n_layer needs a value"),
        ("parts: {}", (), "parts is a list of sections"),
        ("parts: [1]", (), r"parts\[0\] is a section of keys, not 1"),
        ("parts: [{weight: 2}]", (), "name is missing"),
        ("parts: [{name: a, task: {kinds: tag}}]", (), r"unknown key 'parts\[0\].task.kinds'.*Did you mean 'kind'\?"),
        ("parts: [{name: a, task: {kind: seq2seq}}]", (), "a: task.kind=seq2seq must be one of pretrain, classify"),
        ("parts: [{name: a/b}]", (), "name='a/b' must be of letters"),
        ("task: {kind: multi}", (), "task.kind=multi needs two parts or more"),
        ("", ("stray",), "unexpected 'stray'"),
        ("", ("--seed", "x"), "command line: seed='x' must be a whole number"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_place(tmp_path, text, flags, message):
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path, text, *flags)
    assert "\n" not in str(error.value)


def test_a_list_of_sections_reads_back_what_was_written(tmp_path):
    parts = "parts: [{name: a, task: {kind: tag}}, {name: b, weight: 2, task: {kind: classify}, data: {path: [x]}}]"
    config = load(tmp_path, f"task: {{kind: multi}}\n{parts}")
    assert [(part.name, part.weight, part.data.path) for part in config.parts] == [("a", 1.0, ()), ("b", 2.0, ("x",))]
    assert load(tmp_path, to_yaml(config)) == config


def test_brackets_empty_a_list():
    assert read_flags(Config, ["--task.validation_path", "a", "b", "--task.validation_path", "[]"]) == {
        "task": {"validation_path": []}
    }


def test_a_flag_of_yes_or_no_may_go_without_its_value():
    flags = ("--model.bias", "--data.streaming", "false", "--model.tied_embeddings", "--seed", "1")
    assert read_flags(Config, flags) == {
        "model": {"bias": True, "tied_embeddings": True}, "data": {"streaming": False}, "seed": 1
    }  # fmt: skip


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(UserError, match=r"no such config file. Did you mean 'tiny.yaml'\?"):
        load_config(tmp_path / "tiny.yml")


def test_padded_vocabulary_is_the_next_multiple():
    assert ModelConfig(vocab_size=50257, vocab_multiple=128).padded_vocab_size == 50304
    assert ModelConfig(vocab_size=256, vocab_multiple=128).padded_vocab_size == 256


def test_differing_fields_name_both_values():
    old, new = Config(), Config(seed=3, model=ModelConfig(n_layer=2))
    assert differing_fields(old, new) == {"seed": (0, 3), "model.n_layer": (12, 2)}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_load_and_open_with_their_command(path):
    config = load_config(path)
    assert path.read_text().startswith(f"# python train.py configs/{path.name}")
    head = path.read_text().split("\n\n")[0]
    assert "loss" in head
    assert config.run_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("finetune/*.yaml")), ids=lambda path: path.stem)
def test_recipes_load_and_open_with_their_command(path):
    config = load_config(path)
    assert path.read_text().startswith(f"# python train.py configs/finetune/{path.name}\n")
    assert config.run_dir == f"runs/finetune/{path.stem}"
    bases = {f"runs/finetune/{name}" for name in ("base", "speeches", "news_base")}
    assert config.init_from in {"", "runs/demo", *bases}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_mean_what_they_meant(path):
    golden = Path(__file__).parent / "golden" / path.name
    assert to_yaml(load_config(path)) == golden.read_text(encoding="utf-8"), (
        f"a default or {path.name} changed; if that is meant, write the new values to {golden}"
    )


def undocumented(source: str) -> list[str]:
    """Fields of a module's dataclasses that have no text below them; a section's text is that of its class."""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    missing = [node.name for node in classes if node.name.endswith("Config") and not ast.get_docstring(node)]
    for node in classes:
        for field, after in itertools.pairwise([*node.body, ast.Pass()]):
            if not isinstance(field, ast.AnnAssign) or ast.unparse(field.annotation).endswith("Config"):
                continue
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            if not isinstance(text, str) or len(text.split()) < 2:
                missing.append(f"{node.name}.{ast.unparse(field.target)}")
    return missing


@pytest.mark.parametrize("path", sorted(Path(inspect.getfile(Config)).parent.glob("*.py")), ids=lambda path: path.stem)
def test_every_field_is_documented(path):
    assert not undocumented(path.read_text(encoding="utf-8"))


def test_a_field_without_text_is_found():
    source = 'class A:\n  """A."""\n  x: int = 0\n  """An x."""\n  y: int = 0\n  z: int = 0\n  """The z."""'
    assert undocumented(source) == ["A.y"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *(("optim.lr", "optim.learning_rate"), ("lr", "optim.learning_rate"), ("batch_size", "train.batch_size")),
        *(("train.batch-size", "train.batch_size"), ("dropout", "model.dropout"), ("n_layers", "model.n_layer")),
        *(("context_length", "model.block_size"), ("data", "data.path"), ("grad_accum", "train.micro_batch_size")),
        *(("train.warmup", "optim.warmup_steps"), ("out_dir", "run_dir"), ("model.n_layrs", "model.n_layer")),
    ],
)
def test_an_unknown_option_is_understood_by_meaning_then_by_spelling(name, meant):
    with pytest.raises(UserError, match=rf"unknown option --{name}\. Did you mean '{meant}'\?"):
        read_flags(Config, [f"--{name}", "1"])


def test_keys_and_other_verbs_options_are_understood_too(tmp_path):
    with pytest.raises(UserError, match=r"Did you mean 'learning_rate'\?"):
        load(tmp_path, "optim: {lr: 1}")
    with pytest.raises(UserError, match=r"Did you mean 'optim.learning_rate'\?"):
        load(tmp_path, "train: {lr: 1}")
    with pytest.raises(UserError, match=r"Did you mean 'max_new_tokens'\?"):
        read_flags(SampleConfig, ["--length", "1"])
    for name, answer in (
        ("train.wandb", "log.wandb"),
        ("report_to", "metrics.jsonl"),
        ("epochs", "train.num_epochs"),
        ("device", "JAX_PLATFORMS"),
    ):
        with pytest.raises(UserError, match=answer):
            read_flags(Config, [f"--{name}", "1"])


def test_the_table_of_synonyms_names_options_and_verbs_that_exist():
    flags = [flag_types(cls) for cls in (Config, *(cls for _, cls in cli.VERBS.values()))]
    for option, words in synonyms.OPTIONS.items():
        having = [names for names in flags if option in names]
        assert having, option
        assert any(word not in names for names in having for word in words.split())
    assert not set(synonyms.VERBS) - set(cli.VERBS)
    assert not {word for words in synonyms.VERBS.values() for word in words.split()} & set(cli.VERBS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": 1e-9}, "must be 0 .* or at least 0.001"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must not be negative"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"temperature": 0.0, "top_k": 5}, "top_k=5 has no effect without temperature above 0"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SampleConfig(**options)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # pyright: ignore
