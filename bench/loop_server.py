"""The server that people write first: `/v1/completions` over a loop that continues one prompt at a time.

`python -m bench.loop_server --run_dir DIR` is what `python -m bench.serve speed` compares `gptjax serve` with. Requests
wait for a lock. Pieces of text are streamed as `generation.decode.stream` gives them, in the form of OpenAI's API.
"""

import argparse
import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.sample import SampleConfig
from gptjax.generation.decode import stream
from gptjax.generation.request import Request as GenerationRequest
from gptjax.generation.stream import make_text_stream
from gptjax.machine import compile_cache


def make_app(run_dir: Path) -> Starlette:
    """An application with the one endpoint; every request streams."""
    run, lock = load_run(run_dir), threading.Lock()
    tokenizer = run.tokenizer
    assert tokenizer is not None

    def write(body: dict, put) -> None:
        options = SampleConfig(
            max_new_tokens=body["max_tokens"],
            seed=body["seed"],
            ignore_end_of_text=True,
            logit_bias=tuple(f"{token}={value}" for token, value in body["logit_bias"].items()),
        )
        try:
            with lock:
                ids, decode = tokenizer.encode(body["prompt"]), make_text_stream()
                for [piece] in stream(run.config.model, run.params, GenerationRequest([ids], options)):
                    put((decode(tokenizer.decode_bytes(piece.tokens_N), False), piece.tokens_N.tolist()))
        finally:
            put(None)

    async def complete(request: Request) -> StreamingResponse:
        body, loop, pieces = await request.json(), asyncio.get_running_loop(), asyncio.Queue()
        threading.Thread(target=write, args=(body, lambda x: loop.call_soon_threadsafe(pieces.put_nowait, x))).start()

        async def events() -> AsyncIterator[str]:
            while (piece := await pieces.get()) is not None:
                text, tokens = piece[0], [tokenizer.decode([token]) for token in piece[1]]
                choice = {"index": 0, "text": text, "logprobs": {"tokens": tokens}, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", required=True)
    options = parser.parse_args()
    compile_cache.start()
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    app = make_app(Path(options.run_dir))
    print(f"served on http://127.0.0.1:{listening.getsockname()[1]}/", file=sys.stderr, flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
