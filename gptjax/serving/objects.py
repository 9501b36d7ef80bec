"""The response objects of OpenAI's API."""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.serving.engine import Token
from gptjax.text.tokenizers.base import Tokenizer


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def new_id(kind: str) -> str:
    """A new id of a response."""
    return f"{kind}-{secrets.token_hex(12)}"


def envelope(id: str, object: str, model: str) -> dict[str, Any]:
    """The first fields of every response."""
    return {"id": id, "object": object, "created": int(time.time()), "model": model}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token, or `bytes:\\xNN` if it is not valid UTF-8 on its own."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], count: int) -> dict[str, list]:
    """The log-probability object of a completion."""
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {token_text(tokenizer, id): logprob for id, logprob in token.top[:count]}
            if token.logprob is not None
            else None
            for token in tokens
        ],
        "text_offset": [token.begin for token in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], count: int) -> dict[str, list]:
    """The log-probability object of a chat answer."""

    def entry(id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.decode_bytes([id])
        return {"token": token_text(tokenizer, id), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top[:count]]}
            for token in tokens
        ]
    }


def embedding(vector: np.ndarray, encoding: str) -> list[float] | str:
    """An embedding as numbers, or as base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
