"""Server-sent events, and waiting for a result while the client may disconnect."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gptjax.serving.answers import Answer
from gptjax.serving.engine import Update
from gptjax.serving.objects import error_body

T = TypeVar("T")


class Stream(StreamingResponse):
    """Server-sent events. `on_end` is called after the last event, or as soon as the client disconnects."""

    def __init__(self, events: AsyncGenerator[str], on_end: Callable[[], None]):
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def unless_left(request: Request, waiting: Coroutine[Any, Any, T]) -> T:
    """Awaits `waiting`, unless the client disconnects first.

    Raises:
        ClientDisconnect: The client disconnected.
    """
    result, leaving = asyncio.ensure_future(waiting), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({result, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            return result.result()
        raise ClientDisconnect
    finally:
        result.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    """Returns when the client disconnects. The body must already be read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events(answer: Answer, first: tuple[int, Update], updates: asyncio.Queue, left: int) -> AsyncGenerator[str]:
    """Server-sent events of an answer; `left` is the number of its unfinished sequences."""
    for chunk in answer.begin():
        yield _event(chunk)
    index, update = first
    while True:
        if update.error is not None:
            yield _event(error_body(str(update.error), 503))
            return
        for chunk in answer.chunks(index, update):
            yield _event(chunk)
        left -= update.finish is not None
        if not left:
            break
        index, update = await updates.get()
    for chunk in answer.end():
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
