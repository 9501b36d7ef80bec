"""Chats: layouts of rows, the text and targets of a chat, and prompts whose ids are those of training."""

import functools
import json
import os
from collections import Counter

import numpy as np
import pytest

from gptjax.batches.packed import PackedSequences, encode_chats
from gptjax.config.data import DataConfig
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.errors import UserError
from gptjax.tasks.registry import parse, read_examples
from gptjax.text.chats import Chat, Message, render_chat, render_prompt
from gptjax.text.formats import Row
from gptjax.text.tokenizer import make_tokenizer

BYTES = make_tokenizer(TokenizerConfig(kind="bytes"), lambda: [])
END = BYTES.end_of_text
TASK = TaskConfig(kind="instruct", template="<{role}\n{content}|")
TEMPLATES = [
    *("### {role}\n{content}\n\n", "{role}: {content}\n", "{role}:   {content}\n"),
    *("<{role}>{content}|", "[{role} ->]{content}\n", "{role}_{content}\n"),
]
TURNS = [
    Message("user", "What is 2 + 2?"),
    Message("assistant", "It is 4."),
    Message("user", "And 3 + 3, naïve friend?"),
    Message("assistant", "  12345, I'd say;\n\nor 6."),
    Message("user", "日本語 🙂"),
    Message("assistant", "'s fine\nend"),
]


@functools.cache
def tokenizer_of(kind: str):
    if kind == "bytes":
        return BYTES
    if kind == "bpe":
        corpus = [render_chat(TURNS, template, "").text * 9 for template in TEMPLATES]
        return make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=420), lambda: corpus, lambda _: None)
    if "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("needs the published vocabularies: set TIKTOKEN_CACHE_DIR")
    return make_tokenizer(TokenizerConfig(kind="tiktoken", name=kind), lambda: [])


def chats(*rows: dict, task: TaskConfig = TASK, counts: Counter | None = None) -> list[Chat]:
    given = [Row(values, f"a:{number}") for number, values in enumerate(rows, 1)]
    return list(parse(given, task, DataConfig(), counts=counts))


def target_texts(chat: Chat) -> list[str]:
    return [chat.text[start:end] for start, end in chat.targets]


def test_every_layout_is_the_same_chat():
    roles, contents = ("user", "assistant"), ("1+1", "2")
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}]
    found = chats(
        {"prompt": "1+1", "response": "2"},
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "2"}]},
        {"messages": None, "prompt": "1+1", "response": "2"},
        {"messages": [], "conversations": None, "prompt": "1+1", "response": "2"},
        {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}], "prompt": None},
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
        {"conversations": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]},
        {"instruction": "1+1", "input": "", "output": "2"},
    )
    assert {chat.text for chat in found} == {"<user\n1+1|<assistant\n2|"} and len(found) == 9
    assert {tuple(target_texts(chat)) for chat in found} == {("2|",)}
    [alpaca] = chats({"instruction": "Add.", "input": "1+1", "output": "2"})
    assert alpaca.text == "<user\nAdd.\n\n1+1|<assistant\n2|"


def test_a_turn_without_text_is_skipped_and_counted():
    call = {"role": "assistant", "content": None, "tool_calls": [{"x": 1}]}
    whole = [{"role": "user", "content": "4?"}, call, {"role": "tool", "content": "4"}]
    counts = Counter()
    [chat] = chats({"messages": [*whole, {"role": "assistant", "content": "four"}]}, {"messages": whole}, counts=counts)
    assert chat.text == "<user\n4?|<tool\n4|<assistant\nfour|" and target_texts(chat) == ["four|"]
    assert counts == {"turns_without_text": 2, "chats_without_target": 1}


def test_what_was_left_out_is_a_note_of_the_run(tmp_path):
    call = {"role": "assistant", "content": None}
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, call, Message("assistant", "a")._asdict()]}
        for n in range(40)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(TASK, DataConfig(path=(str(path),), validation_fraction=0.3))
    assert found.notes == ("40 turns without text skipped",)


def test_a_chat_without_the_assistant_is_refused():
    with pytest.raises(UserError, match="a:1: no message of role assistant"):
        chats({"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(UserError, match=r"a:1: no field 'messages' \(task.messages_field\); it has 'text'"):
        chats({"text": "x"})
    turn = [{"role": "assistant", "content": "x"}]
    with pytest.raises(UserError, match="a:1: field 'prompt' holds messages, must be a string"):
        chats({"prompt": turn, "response": turn})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "cl100k_base", "o200k_base"])
def test_a_prompt_has_the_ids_that_it_has_in_training(kind, template):
    tokenizer = tokenizer_of(kind)
    whole = render_chat(TURNS, template, "")
    [sequence] = encode_chats([whole], tokenizer, 10_000).sequences
    for n in range(1, len(TURNS), 2):
        prompt = tokenizer.encode(render_prompt(TURNS[:n], template))
        trained = sequence.inputs[: len(prompt) + 1]
        assert [tokenizer.end_of_text, *prompt] == trained.tolist(), TURNS[n]
        assert sequence.targets[len(prompt)] >= 0, "the first token after the prompt is a target"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "cl100k_base"])
def test_targets_are_the_tokens_of_the_whole_text_that_touch_a_response(kind, template):
    tokenizer = tokenizer_of(kind)
    for messages in (TURNS, TURNS[:-1]):
        chat = render_chat(messages, template, "")
        [sequence] = encode_chats([chat], tokenizer, 10_000).sequences
        ids = tokenizer.encode(chat.text)
        assert sequence.inputs.tolist() == [tokenizer.end_of_text, *ids]
        place, touched = 0, []  # by brute force, a byte at a time
        is_target = [False] * len(chat.text.encode())
        for start, end in chat.targets:
            first, last = len(chat.text[:start].encode()), len(chat.text[:end].encode())
            is_target[first:last] = [True] * (last - first)
        for i in ids:
            size = len(tokenizer.decode_bytes([i]))
            touched.append(any(is_target[place : place + size]))
            place += size
        expected = [int(i) if hit else -1 for i, hit in zip(ids, touched, strict=True)]
        last = tokenizer.end_of_text if messages[-1].role == "assistant" else -1
        assert sequence.targets.tolist() == [*expected, last]


def test_a_token_of_the_template_and_a_response_is_a_target():
    turns = [Message("user", "x"), Message("assistant", "e end")]
    chat = render_chat(turns, "{role} th{content}\n", "")
    corpus = [chat.text, "the thex the"] * 9
    tokenizer = make_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), lambda: corpus, lambda _: None)
    [sequence] = encode_chats([chat], tokenizer, 10_000).sequences
    assert tokenizer.decode(sequence.targets[sequence.targets >= 0]).startswith(" the end"), "one token has both"


def test_nothing_is_a_target_after_a_last_turn_of_the_user():
    chat = render_chat([*TURNS, Message("user", "Thanks!")], TASK.template, "")
    [sequence] = encode_chats([chat], BYTES, 10_000).sequences
    after = BYTES.decode(sequence.targets[sequence.targets >= 0])
    assert after.endswith("end|") and sequence.targets[-1] == -1
    assert not (sequence.targets[-len("<user\nThanks!|") :] >= 0).any()


def test_the_denominator_of_bits_per_byte_is_the_text_of_the_targets():
    chat = render_chat(TURNS, TASK.template, "")
    size = sum(len(text.encode()) for text in target_texts(chat))
    assert encode_chats([chat], BYTES, 10_000).target_bytes == size
    short = encode_chats([chat], BYTES, 60)
    [cut] = short.sequences
    assert short.target_bytes == int((cut.targets >= 0).sum()) < size


def test_chats_that_are_too_long_are_counted():
    chat = render_chat([Message("user", "question"), Message("assistant", "answer")], "{role}{content}", "")
    found = encode_chats([chat], BYTES, 24)
    assert (len(found.sequences[0].inputs), found.cut, found.left_out) == (24, 1, 0)
    assert encode_chats([chat], BYTES, 5)[:3] == ([], 1, 1)


def test_epochs_take_every_window_in_another_order():
    found = encode_chats(
        [
            render_chat([Message("user", f"{n:03}"), Message("assistant", "x" * 9)], "{role}{content}", "")
            for n in range(90)
        ],
        BYTES,
        64,
    )
    packed = PackedSequences(found.sequences, 64, seed=3)
    size = len(packed.windows)
    epochs = [[packed.documents(step, 1)[0] for step in range(n * size, (n + 1) * size)] for n in range(3)]
    assert size > 20 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_equal_chats_are_on_one_side_of_the_split(tmp_path):
    rows = [{"prompt": f"q{n % 30}", "response": "a"} for n in range(120)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(TASK, DataConfig(path=(str(path),), validation_fraction=0.3))
    sides = [{chat.text for chat in side} for side in (found.train, found.validation)]
    assert not sides[0] & sides[1] and all(sides)
    assert np.isclose(len(found.train) + len(found.validation), 120)
