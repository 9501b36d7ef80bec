"""Parses request bodies of OpenAI's API strictly.

An unknown or unsupported parameter is an error; no parameter is silently ignored.
"""

import dataclasses
import json
import secrets
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.config.verbs.sample import SampleConfig
from gptjax.errors import UserError
from gptjax.evaluation.embeddings import EmbeddingOptions, Pooling
from gptjax.generation.constraint import Form
from gptjax.generation.slots import MOST_LOGPROBS
from gptjax.text.chats import Message
from gptjax.text.tokenizers.base import Tokenizer
from gptjax.text.unicode import has_surrogate

MOST_SEQUENCES = 128
"""Largest number of sequences (prompts times samples) of one request."""
MOST_STOPS = 16
MOST_TEXTS = 512
"""Largest number of texts in one request for embeddings or labels."""
COMMON = {
    **{"temperature": float, "top_p": float, "presence_penalty": float, "frequency_penalty": float, "seed": int},
    **{"top_k": int, "min_p": float, "typical_p": float, "repetition_penalty": float, "min_tokens": int},
}
"""Numeric parameters of both endpoints; those in the second line are extensions of OpenAI's API."""
OPTIONS = {"min_tokens": "min_new_tokens"}
"""Names in `SampleConfig`, if they differ."""
SHARED = (
    *COMMON,
    "model",
    "stream",
    "stream_options",
    "stop",
    "n",
    "logit_bias",
    "user",
    "ignore_eos",
    "regex",
    "response_format",
)
COMPLETION = (*SHARED, "prompt", "max_tokens", "logprobs", "echo")
CHAT = (*SHARED, "messages", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs")
UNSUPPORTED = (
    *("suffix", "best_of", "tools", "tool_choice", "functions", "function_call", "audio"),
    *("modalities", "prediction", "reasoning_effort", "web_search_options", "dimensions"),
)
"""Parameters of OpenAI's API that are not supported: only null is allowed."""


class Invalid(Exception):
    """An invalid request: HTTP status and fields of OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclasses.dataclass(frozen=True)
class Asked:
    """Parameters that completions and chats share."""

    options: SampleConfig
    samples: int
    stream: bool
    include_usage: bool
    logprobs: int | None
    """Number of most likely tokens to return at each position; None: no log-probabilities."""
    echo: bool = False
    score_only: bool = False
    """Generate no new tokens."""
    form: Form | None = None
    """The required form of the text."""


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parses a body, which must be one JSON object of valid Unicode.

    Raises:
        Invalid: It is not.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(raw, parse_constant=refuse)
        if has_surrogate(json.dumps(body, ensure_ascii=False)):
            raise ValueError("it holds half a surrogate pair")
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the body is no valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise Invalid("the body must be a JSON object")
    return body


def check_names(body: dict[str, Any], known: Sequence[str]) -> None:
    """Checks that all parameters are known, and that unsupported ones are null.

    Raises:
        Invalid: They are not; the message names the parameter.
    """
    for name, value in body.items():
        if name in UNSUPPORTED:
            if value is not None:
                raise Invalid(f"{name} is not supported; leave it out", name)
        elif name not in known:
            raise Invalid(f"unknown parameter {name!r}; known: {', '.join(known)}", name)


def check_model(body: dict[str, Any], model: str) -> None:
    """Checks that the requested model is the served one.

    Raises:
        Invalid: It is not (status 404).
    """
    if body.get("model") not in (None, model):
        raise Invalid(f"the model {body['model']!r} is not served; use {model!r}", "model", "model_not_found", 404)


def read_completion(body: dict[str, Any], most_new: int) -> Asked:
    """Parses the parameters of `/v1/completions`.

    Raises:
        Invalid: A parameter is invalid.
    """
    check_names(body, COMPLETION)
    logprobs = _number(body, "logprobs", int, None, 0, MOST_LOGPROBS)
    echo = _boolean(body, "echo")
    max_tokens = _number(body, "max_tokens", int, min(16, most_new), 0, most_new)
    if not max_tokens and not echo:
        raise Invalid("max_tokens=0 has no effect without echo; ask for at least one token", "max_tokens")
    return _asked(body, logprobs, max_tokens, echo)


def read_chat(body: dict[str, Any], most_new: int) -> Asked:
    """Parses the parameters of `/v1/chat/completions`. The default number of tokens is what fits in the context.

    Raises:
        Invalid: A parameter is invalid.
    """
    check_names(body, CHAT)
    wanted, top = _boolean(body, "logprobs"), _number(body, "top_logprobs", int, None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise Invalid("top_logprobs has no effect without logprobs=true", "top_logprobs")
    limits = [_number(body, name, int, None, 1, most_new) for name in ("max_tokens", "max_completion_tokens")]
    given = [limit for limit in limits if limit is not None]
    if len(given) == 2:
        raise Invalid("max_tokens and max_completion_tokens are both given; leave one out", "max_tokens")
    return _asked(body, (top or 0) if wanted else None, given[0] if given else most_new, False)


def _asked(body: dict[str, Any], logprobs: int | None, max_tokens: int, echo: bool) -> Asked:
    values: dict[str, Any] = {}
    for name, kind in COMMON.items():
        value = _number(body, name, kind, None)
        if value is not None:
            values[OPTIONS.get(name, name)] = value
    if values.get("temperature") == 0:  # these then have no effect, but clients send them anyway
        for name in ("top_p", "top_k", "min_p", "typical_p"):
            values.pop(name, None)
    seed = values.pop("seed", None)
    stop, bias = body.get("stop"), body.get("logit_bias")
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > MOST_STOPS:
        raise Invalid(f"stop must be a text or a list of up to {MOST_STOPS} texts that are not empty", "stop")
    if bias is not None and not (isinstance(bias, dict) and all(_is_number(v) for v in bias.values())):
        raise Invalid("logit_bias must map token ids to numbers", "logit_bias")
    include = body.get("stream_options")
    stream = _boolean(body, "stream")
    if include is not None:
        if not isinstance(include, dict) or set(include) - {"include_usage"}:
            raise Invalid("stream_options must hold include_usage alone", "stream_options")
        if not stream:
            raise Invalid("stream_options has no effect without stream=true", "stream_options")
    try:
        options = SampleConfig(
            **values,
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            max_new_tokens=max(1, max_tokens),
            stop=tuple(stops),
            logit_bias=tuple(f"{token}={value}" for token, value in (bias or {}).items()),
            logprobs=0 if logprobs is None else max(1, logprobs),
            ignore_end_of_text=_boolean(body, "ignore_eos"),
        )
    except UserError as error:
        names = {**{name: name for name in SHARED}, "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
        name = next((names[name] for name in names if str(error).startswith(name)), None)
        raise Invalid(str(error).replace("min_new_tokens", "min_tokens"), name) from None
    return Asked(
        options,
        _number(body, "n", int, 1, 1, MOST_SEQUENCES),
        stream,
        bool(include and _boolean(include, "include_usage")),
        logprobs,
        echo,
        max_tokens == 0,
        _form(body),
    )


def _form(body: dict[str, Any]) -> Form | None:
    regex, given = text(body, "regex"), body.get("response_format")
    if given is not None and not isinstance(given, dict):
        raise Invalid("response_format must be an object with a type", "response_format")
    kind = "text" if given is None else given.get("type")
    schema = None
    if kind == "json_object":
        schema = {"type": "object"}
    elif kind == "json_schema":
        named = (given or {}).get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise Invalid("response_format.json_schema must hold a schema", "response_format")
    elif kind != "text":
        raise Invalid("response_format.type must be text, json_object or json_schema", "response_format")
    if not regex and schema is None:
        return None
    if regex and schema is not None:
        raise Invalid("regex and response_format are both given; leave one out", "regex")
    if _boolean(body, "ignore_eos") or body.get("min_tokens"):
        raise Invalid("ignore_eos and min_tokens do not go with regex or response_format", "regex")
    return Form(regex, schema)


def read_prompts(value: Any, tokenizer: Tokenizer, name: str) -> list[np.ndarray]:
    """The token ids of a text, a list of texts, a list of ids, or a list of lists of ids.

    Raises:
        Invalid: The value has another type, is empty, or cannot be encoded.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Invalid(f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists", name)
    prompts = []
    for item in value:
        if isinstance(item, str):
            try:
                ids = tokenizer.encode(item)
            except UserError as error:
                raise Invalid(str(error), name) from None
        elif isinstance(item, list) and all(type(token) is int for token in item):
            outside = next((token for token in item if not 0 <= token < tokenizer.vocab_size), None)
            if outside is not None:
                raise Invalid(f"token {outside} is outside the vocabulary of {tokenizer.vocab_size}", name)
            ids = np.array(item, np.int32)
        else:
            raise Invalid(f"{name} must hold texts or lists of token ids", name)
        if not len(ids):
            raise Invalid(f"{name} is empty; give at least one character or token", name)
        prompts.append(ids)
    return prompts


def read_embedding(body: dict[str, Any]) -> EmbeddingOptions:
    """Parses the parameters of `/v1/embeddings`.

    Raises:
        Invalid: A parameter is invalid.
    """
    default = EmbeddingOptions(normalized=True)  # as in OpenAI's API
    pooling = body.get("pooling") or default.pooling
    if pooling not in typing.get_args(Pooling):
        raise Invalid(f"pooling must be one of {', '.join(typing.get_args(Pooling))}", "pooling")
    normalized = default.normalized if body.get("normalized") is None else _boolean(body, "normalized")
    return EmbeddingOptions(_number(body, "layer", int, default.layer), pooling, normalized)


def text(body: dict[str, Any], name: str) -> str:
    """A text parameter; empty by default.

    Raises:
        Invalid: It is not a text.
    """
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Invalid(f"{name} must be a text", name)
    return value or ""


def read_messages(value: Any) -> list[Message]:
    """Parses the messages of a chat.

    Raises:
        Invalid: They are malformed, or have content that is not text.
    """
    if not isinstance(value, list) or not value:
        raise Invalid("messages must be a list of at least one {role, content}", "messages")
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or set(message) - {"role", "content", "name"}:
            raise Invalid(f"{where} must hold role and content alone", where)
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in ("system", "user", "assistant"):
            raise Invalid(f"{where}.role={role!r} must be system, user or assistant", f"{where}.role")
        if isinstance(content, list) and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not content.strip():
            raise Invalid(f"{where}.content must be text, and not empty", f"{where}.content")
        messages.append(Message(role, content))
    if messages[-1].role == "assistant":
        raise Invalid("the last message must not be the assistant's", "messages")
    return messages


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(body: dict, name: str, kind: type, default: Any, least: float | None = None, most: float | None = None):
    value = body.get(name)
    if value is None:
        return default
    if not _is_number(value) or (kind is int and not isinstance(value, int)):
        raise Invalid(f"{name} must be a {'whole ' if kind is int else ''}number", name)
    if abs(value) > 2**63 or (least is not None and value < least) or (most is not None and value > most):
        raise Invalid(f"{name}={value} must lie in [{least}, {most}]", name)
    return kind(value)


def _boolean(body: dict, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Invalid(f"{name} must be true or false", name)
    return bool(value)
