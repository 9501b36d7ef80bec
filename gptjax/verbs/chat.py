"""`gptjax chat`."""

import sys
from collections.abc import Callable
from pathlib import Path

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.chat import ChatConfig
from gptjax.errors import UserError
from gptjax.machine import compile_cache
from gptjax.report.progress import notify
from gptjax.serving.conversation import Conversation
from gptjax.verbs.sample import load_draft

HELP = """/reset        delete the conversation
/system TEXT  start a new conversation with this system message
/save FILE    write the messages as a row of JSONL
/exit         end, as Ctrl-D does
Ctrl-C ends an answer."""


def run_chat(config: ChatConfig) -> int:
    """Reads messages from the terminal or standard input, and streams the answers to standard output."""
    compile_cache.start()
    run = load_run(Path(config.run_dir).expanduser(), config.checkpoint, config.strict, notify, config.base)
    draft = None if run.tokenizer is None else load_draft(config, run.tokenizer)
    conversation = Conversation(run, config, config.system, notify, draft)
    del run, draft  # the conversation has the model in its layout for decoding
    if conversation.format is None:
        notify(f"{config.run_dir}: learned no chats; it continues what you write")
    read = _reader()
    while (line := read()) is not None:
        try:
            if not _command(conversation, line):
                return 0
        except UserError as error:
            notify(str(error))
    return 0


def _command(conversation: Conversation, line: str) -> bool:
    """Executes a line; returns whether to continue."""
    word, _, rest = line.strip().partition(" ")
    if word == "/exit":
        return False
    if word == "/reset":
        conversation.reset()
    elif word == "/system":
        if conversation.format is None:
            raise UserError("/system has no effect: the run learned no chats")
        conversation.system = rest.strip()
        conversation.reset()
    elif word == "/save":
        if not rest.strip():
            raise UserError("/save needs the name of a file")
        path = Path(rest.strip()).expanduser()
        try:
            conversation.save(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        notify(f"{path}: {len(conversation.messages)} messages")
    elif word.startswith("/") and word[1:].isalpha():
        notify(HELP if word == "/help" else f"unknown command {word}. Commands:\n{HELP}")
    elif line.strip():
        _answer(conversation, line)
    return True


def _answer(conversation: Conversation, line: str) -> None:
    pieces = conversation.answer(line)
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pieces.close()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if conversation.accepted:
        notify(conversation.accepted)


def _reader() -> Callable[[], str | None]:
    """A function that returns the next line, or None at the end. On a terminal it has history and editing."""
    if not sys.stdin.isatty():
        lines = iter(sys.stdin.readline, "")
        return lambda: next((line.removesuffix("\n") for line in lines), None)
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        notify("install 'gptjax[chat]' for history and editing of lines")
        return lambda: _line(input)
    session: PromptSession = PromptSession()
    return lambda: _line(session.prompt)


def _line(prompt: Callable[[str], str]) -> str | None:
    try:
        return prompt("> ")
    except EOFError:
        return None
