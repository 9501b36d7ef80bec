"""Config files and flags: each is read, or refused in one line."""

import functools
import math
import tempfile
from pathlib import Path

import yaml
from hypothesis import strategies as st

from gptjax.cli import VERBS
from gptjax.config.reader import flag_types, from_dict, load_config, read_flags, to_dict, to_yaml
from gptjax.config.run import Config
from tests.fuzz.fuzz import EDITS, ODD_NUMBER, ODD_TEXT, ODD_VALUE, fuzz, mutate, refusals

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
NAMES = sorted(flag_types(Config))
SECTIONS = sorted({name.partition(".")[0] for name in NAMES if "." in name})
FIELDS = {section: [n.partition(".")[2] for n in NAMES if n.startswith(f"{section}.")] for section in SECTIONS}


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="gptjax-fuzz-"))


def load(content: bytes) -> None:
    """Reads a config file; one that is accepted must be written and read back as the same config."""
    path = folder() / "c.yaml"
    path.write_bytes(content)
    with refusals():
        config = load_config(path)
        check(config)


def check(config: Config) -> None:
    for value in flatten(to_dict(config)):
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(value, int) or abs(value) < 2**63
    again = folder() / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(again) == config


def flatten(values: dict):
    for value in values.values():
        if isinstance(value, dict):
            yield from flatten(value)
        else:
            yield value


@fuzz(100, st.binary(max_size=200))
def test_any_bytes_as_a_config_file(content):
    load(content)


@fuzz(100, st.sampled_from(PRESETS), EDITS)
def test_mutated_presets(preset, edits):
    load(mutate(preset.read_bytes(), edits))


@st.composite
def config_like(draw):
    sections = {}
    for section in draw(st.lists(st.sampled_from(SECTIONS), max_size=3, unique=True)):
        names = draw(st.lists(st.sampled_from(FIELDS[section]), max_size=4, unique=True))
        sections[section] = {name: draw(ODD_VALUE) for name in names}
    for name in draw(st.lists(st.sampled_from(["seed", "run_dir", "init_from", "cache_dir", "model"]), max_size=1)):
        sections[name] = draw(ODD_VALUE)
    return sections


@fuzz(150, config_like())
def test_known_keys_with_odd_values(raw):
    with refusals():
        check(from_dict(Config, raw, "fuzz"))
    try:
        content = yaml.safe_dump(raw, allow_unicode=True).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return
    load(content)


@fuzz(100, st.dictionaries(ODD_TEXT, ODD_VALUE, max_size=4))
def test_any_keys(raw):
    with refusals():
        from_dict(Config, raw, "fuzz")


FLAG_NAMES = st.one_of(st.sampled_from(NAMES), ODD_TEXT)
FLAG_VALUES = st.one_of(
    ODD_TEXT, ODD_NUMBER.map(str), st.sampled_from(["true", "False", "bytes", "auto", "1", "2", "0.5"])
)
WORDS = st.one_of(
    st.builds(lambda name, value: [f"--{name}", value], FLAG_NAMES, FLAG_VALUES),
    st.builds(lambda name, value: [f"--{name}={value}"], FLAG_NAMES, FLAG_VALUES),
    st.builds(lambda name: [f"--{name}"], FLAG_NAMES),
    FLAG_VALUES.map(lambda value: [value]),
)


@fuzz(200, st.lists(WORDS, max_size=4))
def test_flags_of_a_run(words):
    args = [word for pair in words for word in pair]
    with refusals():
        check(from_dict(Config, read_flags(Config, args), "command line"))


@fuzz(150, st.sampled_from(sorted(VERBS)), st.data())
def test_flags_of_every_verb(verb, data):
    options = VERBS[verb][1]
    names = st.one_of(st.sampled_from(sorted(flag_types(options))), ODD_TEXT)
    words = data.draw(st.lists(st.tuples(names, FLAG_VALUES), max_size=4))
    args = [word for name, value in words for word in (f"--{name}", value)]
    with refusals():
        from_dict(options, read_flags(options, args), "command line")
