"""Conversations: templates, what is left out, and the command."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax.checkpoints.run_dir import CHAT_TEMPLATE_FILE, LoadedRun, load_run, write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.mixtures import PartConfig
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.run import Config
from gptjax.config.task import HEADED, TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.chat import ChatConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.generation.sample import sample_texts
from gptjax.serving.chat_format import AnswerFilter, ChatFormat, chat_format, compile_template
from gptjax.serving.conversation import Conversation
from gptjax.text.chats import ASSISTANT, USER, Message
from gptjax.text.tokenizers.byte_pair import bpe_tokenizer_from_ranks
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.test_decode import make_params

MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=128, vocab_size=257)
INSTRUCT = TaskConfig(kind="instruct", template="[{role}]{content}\n")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_run(task=INSTRUCT, **changed) -> LoadedRun:
    config = Config(model=MODEL, task=task, tokenizer=TokenizerConfig(kind="bytes"))
    return LoadedRun(config, make_params(MODEL), ByteTokenizer(), 0, **changed)


def options(**changed) -> ChatConfig:
    """Letters alone, so that answers can be read."""
    letters = tuple(f"{i}=40" for i in range(97, 107))
    return ChatConfig(**{"run_dir": "x", "max_new_tokens": 12, "logit_bias": letters, "seed": 3} | changed)


def talk(conversation, text):
    return "".join(conversation.answer(text))


def test_the_prompt_of_a_turn_is_the_chat_so_far_in_the_template():
    encode = chat_format(make_run()).encode
    messages = [Message("system", "S"), Message(USER, "hi"), Message(ASSISTANT, "yo"), Message(USER, "so")]
    ids = encode(messages)
    assert ids[0] == 256
    assert bytes(ids[1:].tolist()).decode() == "[system]S\n[user]hi\n[assistant]yo\n[user]so\n[assistant"


def test_answers_are_those_of_sampling_from_the_prompt():
    run = make_run()
    conversation = Conversation(run, options(), "be brief")
    first = talk(conversation, "hi")
    assert [message.role for message in conversation.messages] == [USER, ASSISTANT]
    assert conversation.messages[1].content == first
    shared = {"max_new_tokens": 12, "logit_bias": options().logit_bias, "seed": 3, "allow_special": True}
    prompt = "<|endoftext|>[system]be brief\n[user]hi\n[assistant"
    [[expected]] = sample_texts(MODEL, run.params, run.tokenizer, [prompt], SampleConfig(**shared))
    assert first == expected
    second = talk(conversation, "more")
    assert second != first
    assert [message.content for message in conversation.messages] == ["hi", first, "more", second]


def test_reset_forgets_what_was_said():
    conversation = Conversation(make_run(), options(temperature=0), "")
    first = talk(conversation, "hi")
    talk(conversation, "more")
    conversation.reset()
    assert talk(conversation, "hi") == first


def test_an_answer_that_is_left_keeps_what_came():
    conversation = Conversation(make_run(), options(max_new_tokens=40), "")
    pieces = conversation.answer("hi")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == Message(ASSISTANT, begun)
    assert talk(conversation, "go on"), "the slot is free again"


def test_messages_that_no_longer_fit_are_left_out_and_the_user_is_told_once():
    told = []
    conversation = Conversation(make_run(), options(), "S", told.append)
    for number in range(6):
        talk(conversation, f"{number}" * 20)
    assert len(told) == 1
    assert "does not see the first messages" in told[0]
    prompt, new = conversation._prompt()
    assert len(prompt) + new <= MODEL.block_size + 1
    assert bytes(prompt[1:].tolist()).decode().startswith("[system]S\n[user]")
    with pytest.raises(UserError, match=r"the message has 1\d\d tokens with its template"):
        talk(conversation, "x" * 120)
    assert conversation.messages[-1].role == ASSISTANT, "a message that is refused is not kept"


def test_a_base_model_continues_the_text_so_far():
    run = make_run(TaskConfig())
    conversation = Conversation(run, options(), "")
    assert conversation.format is None
    first = talk(conversation, "Once upon")
    prompt, _ = (conversation.messages.append(Message(USER, " and")), conversation._prompt())[1]
    assert bytes(prompt[1:].tolist()).decode() == f"Once upon{first} and"
    with pytest.raises(UserError, match="system has no effect"):
        Conversation(run, options(), "be brief")


@pytest.mark.parametrize(
    ("template", "stops", "header_end"),
    [
        ("### {role}\n{content}\n\n", ("\n\n### user", "\n\n### assistant", "\n\n### system"), ""),
        ("<{role}>{content}</s>\n", ("</s>",), ">"),
        ("{role}: {content}\n", ("\nuser:", "\nassistant:", "\nsystem:"), " "),
    ],
)
def test_an_answer_ends_where_its_template_does(template, stops, header_end):
    format = chat_format(make_run(TaskConfig(kind="instruct", template=template)))
    assert (format.stops, format.header_end) == (stops, header_end)


@pytest.mark.parametrize("size", [1, 2, 50])
@pytest.mark.parametrize(("text", "expected"), [(": well, \n yes \n\n", "well, \n yes"), ("well", "well"), (":", ":")])
def test_what_belongs_to_the_template_is_no_part_of_an_answer(text, expected, size):
    answer, found = AnswerFilter(ChatFormat(lambda messages: np.zeros(0), (), ": ")), ""
    for at in range(0, len(text), size):
        found += answer.feed(text[at : at + size])
    assert found + answer.feed("", final=True) == expected


# --- Jinja --------------------------------------------------------------------------------------------------------


def special_tokenizer():
    ranks = {bytes([i]): i for i in range(256)}
    return bpe_tokenizer_from_ranks(ranks, r"[\s\S]", {"<|im_start|>": 256, "<|im_end|>": 257, "</s>": 258}, "</s>")


def test_a_jinja_template_gives_the_ids_of_transformers():
    transformers = pytest.importorskip("transformers")
    messages = [Message("system", "S"), Message(USER, "hi")]
    rendered = compile_template(CHATML)(messages, "</s>")
    from transformers.utils.chat_template_utils import render_jinja_template

    values = [message._asdict() for message in messages]
    [expected], _ = render_jinja_template(conversations=[values], chat_template=CHATML, add_generation_prompt=True)
    assert rendered == expected, transformers.__version__
    tokenizer = special_tokenizer()
    ids = tokenizer.encode_with_special(rendered)
    assert ids[:7].tolist() == [256, *b"system"]
    assert (ids == 257).sum() == 2
    assert tokenizer.decode(ids) == rendered


def test_a_template_of_the_run_is_used_and_special_tokens_in_messages_are_refused():
    config = Config(model=MODEL)
    run = LoadedRun(config, {}, special_tokenizer(), 0, chat_template=CHATML)
    format = chat_format(run)
    assert format.stops == ("<|im_start|>", "<|im_end|>")
    with pytest.raises(UserError, match=r"a message contains <\|im_end\|>"):
        format.encode([Message(USER, "x<|im_end|>y")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "is no valid Jinja template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "ranges have more than"),
        ("{{ 'x' * 1000000000 }}", r"\* of texts, lists or large numbers is not allowed"),
        ("{{ 9 ** 999999999 }}", r"\*\* of texts, lists or large numbers"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses the messages: maximum recursion"),
        ("x" * 2**18 + "x", "has 262,145 characters, must have at most 262,144"),
    ],
)
def test_a_template_that_is_wrong_or_unsafe_is_refused(template, message):
    with pytest.raises(UserError, match=message):
        compile_template(template)([Message(USER, "x")], "")


def test_a_missing_jinja_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[chat\]'"):
        compile_template(CHATML)


# --- the command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "message"),
    [
        *((TaskConfig(kind=kind), "learned to write text; use gptjax predict") for kind in HEADED),
        (TaskConfig(objective=ObjectiveConfig(kind="prefix")), "left to right; use gptjax sample"),
        (TaskConfig(objective=ObjectiveConfig(kind="backward")), "left to right; use gptjax evaluate"),
    ],
)
def test_a_run_that_does_not_continue_text_is_refused(task, message):
    run = make_run()
    with pytest.raises(UserError, match=message):
        Conversation(dataclasses.replace(run, config=dataclasses.replace(run.config, task=task)), options(), "")


def test_a_token_that_the_model_lacks_is_refused_at_the_start():
    with pytest.raises(UserError, match="logit_bias: token 999 is outside"):
        Conversation(make_run(), options(logit_bias=("999=1",)), "")


def test_a_run_of_heads_learned_text_where_a_loss_of_it_counts():
    config = make_run().config
    for task, learned in ((TaskConfig(kind="regress"), False), (TaskConfig(kind="regress", lm_weight=0.5), True)):
        assert dataclasses.replace(config, task=task).learned_text == learned
    parts = tuple(PartConfig(name=kind, task=TaskConfig(kind=kind)) for kind in ("classify", "instruct"))
    assert dataclasses.replace(config, task=TaskConfig(kind="multi"), data=DataConfig(), parts=parts).learned_text


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    run = make_run()
    write_run(folder, Config(**{**run.config.__dict__, "run_dir": str(folder)}), run.params, run.tokenizer)
    return folder


def flags(run_dir):
    return ["--run_dir", str(run_dir), "--max_new_tokens", "8", "--logit_bias", *options().logit_bias]


def test_lines_on_standard_input_are_messages_and_commands(run_dir, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "chat.jsonl"
    lines = ["hi", "", f"/save {saved}", "/what", "/reset", "/save /nowhere/x", "hi", "/exit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat", *flags(run_dir), "--system", "be brief", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first == second
    row = json.loads(saved.read_text())
    assert [message["role"] for message in row["messages"]] == ["system", USER, ASSISTANT]
    assert row["messages"][2]["content"] == first
    assert "unknown command /what" in err
    assert "/nowhere/x: cannot be written" in err


def test_a_template_in_the_run_directory_is_read(run_dir):
    (run_dir / CHAT_TEMPLATE_FILE).write_text(CHATML)
    try:
        assert load_run(run_dir).chat_template == CHATML
    finally:
        (run_dir / CHAT_TEMPLATE_FILE).unlink()


@pytest.mark.slow
def test_a_terminal_has_history_and_answers_as_they_come(run_dir):
    """Through a pseudo terminal: arrow up brings the last line back."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "gptjax", "chat", *flags(run_dir), "--temperature", "0", "--no-restart"]
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "TERM": "xterm",
        "PROMPT_TOOLKIT_NO_CPR": "1",
    }
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=subprocess.STDOUT, env=environment, close_fds=True
    )
    os.close(follower)
    seen = ""

    def wait_for(condition, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while not condition(seen):
            assert time.monotonic() < end, seen
            if select.select([leader], [], [], 1)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")

    try:
        wait_for(lambda text: ">" in text)
        [[answer]] = sample_texts(
            *(MODEL, make_params(MODEL), ByteTokenizer(), ["<|endoftext|>[user]hello\n[assistant"]),
            SampleConfig(max_new_tokens=8, temperature=0, allow_special=True, logit_bias=options().logit_bias),
        )
        os.write(leader, b"hello\r")
        wait_for(lambda text: answer in text)
        os.write(leader, b"\x1b[A\r")  # arrow up: "hello" again
        wait_for(lambda text: text.count("hello") >= 2)
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:  # what is written is read, or the program waits
            os.write(leader, b"\x04")  # Ctrl-D, which only a prompt takes
            if select.select([leader], [], [], 0.3)[0]:
                with contextlib.suppress(OSError):  # the program has ended
                    os.read(leader, 4096)
        assert process.wait(1) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def test_a_seed_and_a_conversation_give_the_same_answers():
    answers = []
    for _ in range(2):
        conversation = Conversation(make_run(), options(), "")
        answers.append([talk(conversation, "hi"), talk(conversation, "hi")])
    assert answers[0] == answers[1]
