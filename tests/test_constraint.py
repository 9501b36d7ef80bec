"""Texts of a given form: regular expressions and JSON schemas."""

import dataclasses
import json
import re
import string

import numpy as np
import pytest

pytest.importorskip("llguidance", reason="needs the package of gptjax[constrain]")

from gptjax.config.model import ModelConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.constraint import Constrainer, Form
from gptjax.generation.decode import prepare
from gptjax.generation.sample import samples
from gptjax.generation.slots import Row, SlotDecoder
from gptjax.text.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.test_decode import make_params
from tests.test_slots import run

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "tall": {"type": "boolean"}},
    "required": ["name", "tall"],
    "additionalProperties": False,
}
LETTERS = f'{string.ascii_letters}{string.digits}-{{}}":,'
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=128, vocab_size=257)


@pytest.mark.parametrize(
    "tokenizer", [ByteTokenizer(), CharTokenizer("ab/0123456789]\n", False)], ids=["end", "no end"]
)
def test_exactly_the_tokens_are_allowed_with_which_the_text_can_match(tokenizer):
    form = Form(regex="(ab|b)/[0-9]{1,2}")
    constraint = Constrainer(tokenizer).make(form, "]")

    def allowed():
        tokens = np.flatnonzero(constraint.allowed())
        end = tokenizer.end_of_text
        return {"end" if token == end else tokenizer.decode([token]) for token in tokens}

    end = set() if tokenizer.end_of_text is None else {"end"}
    for text, expected in (("", "]"), ("]", "ab"), ("a", "b"), ("b", "/"), ("/", "0123456789")):
        constraint.add(tokenizer.encode(text).tolist() if text else [])
        assert allowed() == set(expected)
    constraint.add(tokenizer.encode("4").tolist())
    assert allowed() == set("0123456789") | end
    constraint.add(tokenizer.encode("2").tolist())
    assert allowed() == end


def test_constrained_rows_match_and_others_are_as_alone():
    make = Constrainer(ByteTokenizer()).make
    forms = [Form(schema=PERSON), Form(regex="[ab]{3,5}-[0-9]{2}"), None, Form(schema=PERSON), None]
    rows = [
        Row(
            np.arange(4, dtype=np.int32),
            SampleConfig(max_new_tokens=60, seed=n, temperature=n / 2),
            256,
            constraint=None if form is None else make(form),
        )
        for n, form in enumerate(forms)
    ]

    def decoder(slots):
        return SlotDecoder(prepare(MODEL, make_params(MODEL), SampleConfig(), slots), slots)

    found = run(decoder(3), rows)
    texts = [bytes(tokens).decode(errors="replace") for tokens in found]
    assert re.fullmatch("[ab]{3,5}-[0-9]{2}", texts[1])
    for text in (texts[0], texts[3]):
        person = json.loads(text)
        assert set(person) == {"name", "tall"} and len(person["name"]) <= 4 and isinstance(person["tall"], bool)
    for n in (2, 4):
        [alone] = run(decoder(3), [Row(rows[n].prompt, rows[n].options, 256)])
        assert found[n] == alone


@pytest.mark.parametrize(
    ("regex", "text"),
    [("a/b", "a/b"), (r"a\/b", "a/b"), (r"a\\/b", "a\\/b"), ("a\n[/]", "a\n/"), (r"\\\/", "\\/"), ("a\\\nb", "a\nb")],
)
def test_a_slash_and_a_backslash_are_those_of_the_expression(regex, text):
    assert re.fullmatch(regex, text)
    constraint, tokenizer = Constrainer(ByteTokenizer()).make(Form(regex=regex)), ByteTokenizer()
    for token in tokenizer.encode(text).tolist():
        assert np.flatnonzero(constraint.allowed()).tolist() == [token]
        constraint.add([token])
    assert np.flatnonzero(constraint.allowed()).tolist() == [tokenizer.end_of_text]


@pytest.mark.parametrize(
    ("form", "message"),
    [(Form(regex="(a"), r"regex: .*unclosed group"), (Form(schema={"type": "cat"}), "JSON schema: .*Invalid type")],
)
def test_a_malformed_form_is_refused(form, message):
    with pytest.raises(UserError, match=message):
        Constrainer(ByteTokenizer()).check(form)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer(LETTERS, False)], ids=["end", "no end"])
def test_samples_match_their_regex_or_schema_whatever_else_is_asked(tokenizer, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size)
    shared = {"max_new_tokens": 60, "num_samples": 2, "repetition_penalty": 1.2}

    def write(**options):
        config = SampleConfig(**shared, **options)
        return samples(model, make_params(model), tokenizer, ["ab", "a"], config)

    found = write(regex="[ab]{3,5}-[0-9]{2}", logit_bias=(f"{tokenizer.encode('b')[0]}=3",))
    assert all(re.fullmatch("[ab]{3,5}-[0-9]{2}", sample.text) for row in found for sample in row)
    assert {sample.finish for row in found for sample in row} == {"stop"}
    people = [json.loads(sample.text) for row in write(json_schema=str(tmp_path / "schema.json")) for sample in row]
    assert all(set(person) == {"name", "tall"} and isinstance(person["tall"], bool) for person in people)
    assert len({person["name"] for person in people}) > 1


def test_forms_that_cannot_be_read_are_named(tmp_path):
    def write(**options):
        return samples(MODEL, make_params(MODEL), ByteTokenizer(), ["a"], SampleConfig(max_new_tokens=4, **options))

    (tmp_path / "list.json").write_text("[1]")
    for name, message in (("missing.json", "cannot be read"), ("list.json", "must hold a JSON object")):
        with pytest.raises(UserError, match=f"json_schema=.*{message}"):
            write(json_schema=str(tmp_path / name))
    with pytest.raises(UserError, match=r"regex: .*unclosed group"):
        write(regex="(a")
    for unfit in ({"bad_words": ("x",)}, {"num_beams": 2, "temperature": 0}, {"json_schema": "x"}):
        with pytest.raises(UserError, match=r"has no effect|both set"):
            SampleConfig(regex="a", **unfit)
