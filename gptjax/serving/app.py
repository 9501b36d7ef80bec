"""The HTTP server: routes compatible with OpenAI's API.

Shape suffixes: D n_embd.
"""

import asyncio
import contextlib
import hmac
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from gptjax.config.verbs.serve import ServeConfig
from gptjax.errors import UserError
from gptjax.evaluation.embeddings import BATCH, check_layer, document
from gptjax.serving import objects, protocol
from gptjax.serving.answers import Answer, ChatAnswer, CompletionAnswer
from gptjax.serving.engine import Engine, Failure, Job, QueueFull, Update
from gptjax.serving.protocol import Invalid
from gptjax.serving.service import Service
from gptjax.serving.stream import Stream, events, unless_left

PAGE = Path(__file__).with_name("page.html")
POLICY = (
    *("default-src 'none'", "connect-src 'self'", "img-src data:", "style-src 'unsafe-inline'"),
    *("script-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
)
"""Content security policy of the page: it may load only itself and this server's responses."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
OPEN = ("/", "/health")
"""Paths that do not need an API key."""
Handler = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, config: ServeConfig, keys: Sequence[str] = ()) -> Starlette:
    """Returns the ASGI application of a service. With `keys`, each request must send one of these API keys."""
    server = _Server(service, config, keys)
    paths: dict[str, tuple[str, Handler]] = {
        "/": ("GET", server.page),
        "/health": ("GET", server.health),
        "/metrics": ("GET", server.metrics),
        "/v1/models": ("GET", server.models),
        "/v1/models/{name:path}": ("GET", server.model),
        "/tokenize": ("POST", server.tokenize),
        "/detokenize": ("POST", server.detokenize),
        "/tokenizer_info": ("GET", server.tokenizer_info),
        "/v1/completions": ("POST", server.completions),
        "/v1/chat/completions": ("POST", server.chat),
        "/v1/embeddings": ("POST", server.embeddings),
        "/v1/classify": ("POST", server.classify),
    }
    routes = [Route(path, server.guarded(path, handler), methods=[method]) for path, (method, handler) in paths.items()]

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette):
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    middleware = []
    if config.cors_origin:
        middleware = [
            Middleware(
                CORSMiddleware,
                allow_origins=list(config.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        ]
    handlers = {404: _not_found, 405: _not_found}
    app = Starlette(routes=routes, lifespan=lifespan, middleware=middleware, exception_handlers=handlers)
    app.state.service = service
    return app


class _Server:
    """The handlers of one service."""

    def __init__(self, service: Service, config: ServeConfig, keys: Sequence[str]):
        self._service, self._config = service, config
        self._keys = [key.encode() for key in keys]

    def guarded(self, path: str, handler: Handler) -> Handler:
        """Wraps a handler: checks the request, converts errors to OpenAI's format, and counts the request."""

        async def handle(request: Request) -> Response:
            begin = time.monotonic()
            try:
                self._check(request, path)
                response = await handler(request)
            except Invalid as error:
                response = _error(str(error), error.status, error.param, error.code)
            except UserError as error:
                response = _error(str(error), 400)
            except QueueFull:
                response = _error("the server is busy; try again later", 429, code="queue_full")
                response.headers["retry-after"] = "1"
            except Failure as error:
                response = _error(str(error), 503)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception:
                traceback.print_exc()
                response = _error("the server failed; its log says why", 500)
            self._service.metrics.request(path, response.status_code, time.monotonic() - begin)
            return response

        return handle

    def _check(self, request: Request, path: str) -> None:
        # Against DNS rebinding: a web page of another site must not reach a server that listens only to this machine.
        host = _host(request)
        if self._config.host in LOOPBACK and host not in LOOPBACK:
            raise Invalid(f"the host {host!r} is not served here", status=421)
        if self._keys and path not in OPEN:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(given.encode(), key) for key in self._keys):
                raise Invalid("the API key is missing or wrong", code="invalid_api_key", status=401)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise Invalid(f"content-type is {kind!r}, must be application/json", status=415)

    async def _body(self, request: Request) -> dict[str, Any]:
        """Reads the body as JSON; rejects it as soon as it is too large or takes too long."""
        raw, most = bytearray(), self._config.max_body_bytes
        try:
            async with asyncio.timeout(self._config.max_seconds):
                async for chunk in request.stream():
                    raw += chunk
                    if len(raw) > most:
                        raise Invalid(f"the body is larger than {most:,} bytes", code="body_too_large", status=413)
        except TimeoutError:
            raise Invalid("the body takes too long to arrive", status=408) from None
        return protocol.parse_json(bytes(raw))

    # --- information ------------------------------------------------------------------------------------------

    async def page(self, _request: Request) -> Response:
        """A web page to try the model."""
        headers = {"content-security-policy": "; ".join(POLICY)}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    async def health(self, _request: Request) -> Response:
        """Whether the server accepts requests."""
        engine = self._service.engine
        if engine is None:
            return JSONResponse({"status": "ok"})
        counts = {"slots_busy": engine.busy, "queue_length": engine.waiting}
        return JSONResponse({"status": "ok" if engine.works else "closing"} | counts, 200 if engine.works else 503)

    async def metrics(self, _request: Request) -> Response:
        """Metrics in Prometheus's text format."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, _request: Request) -> Response:
        """The list of models, which has one entry."""
        return JSONResponse({"object": "list", "data": [self._service.description()]})

    async def model(self, request: Request) -> Response:
        """The model, by its name."""
        protocol.check_model({"model": request.path_params["name"]}, self._service.name)
        return JSONResponse(self._service.description())

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text. A text that is exactly the tokenizer's end token gives its id."""
        body = await self._body(request)
        protocol.check_names(body, ("model", "prompt", "add_special_tokens"))
        tokenizer, text = self._service.tokenizer, protocol.text(body, "prompt")
        if body.get("add_special_tokens"):
            raise Invalid("add_special_tokens must be false: the server adds none to prompts", "add_special_tokens")
        if text == tokenizer.end_token and tokenizer.end_of_text is not None:
            ids = [tokenizer.end_of_text]
        else:
            ids = (await asyncio.to_thread(tokenizer.encode, text)).tolist()
        names = [objects.token_text(tokenizer, id) for id in ids]
        size = self._service.run.config.model.block_size
        return JSONResponse({"tokens": ids, "count": len(ids), "token_strs": names, "max_model_len": size})

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        body = await self._body(request)
        protocol.check_names(body, ("model", "tokens"))
        [ids] = protocol.read_prompts([body.get("tokens")], self._service.tokenizer, "tokens")
        return JSONResponse({"prompt": self._service.tokenizer.decode(ids)})

    async def tokenizer_info(self, _request: Request) -> Response:
        """The special tokens; evaluation programs request them."""
        tokenizer = self._service.tokenizer
        end = None if tokenizer.end_of_text is None else tokenizer.end_token
        return JSONResponse({"eos_token": end, "bos_token": end, "pad_token": end})

    # --- text -------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        """Continues prompts."""
        body = await self._body(request)
        self._engine()
        protocol.check_model(body, self._service.name)
        asked = protocol.read_completion(body, self._config.max_new_tokens)
        prompts = await asyncio.to_thread(protocol.read_prompts, body.get("prompt"), self._service.tokenizer, "prompt")
        answer = CompletionAnswer(asked, prompts, self._service.tokenizer, self._service.name)
        return await self._respond(request, answer)

    async def chat(self, request: Request) -> Response:
        """Answers a chat."""
        body = await self._body(request)
        self._engine()
        protocol.check_model(body, self._service.name)
        asked = protocol.read_chat(body, self._config.max_new_tokens)
        messages = protocol.read_messages(body.get("messages"))
        format = self._service.chat_format
        if format is None:
            raise Invalid("the model learned no chats; use /v1/completions", code="no_chat_template")
        prompt = await asyncio.to_thread(format.encode, messages)
        named = any(body.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        most_new = None if named else self._service.run.config.model.block_size + 1 - len(prompt)
        service = self._service
        return await self._respond(
            request, ChatAnswer(asked, prompt, service.tokenizer, service.name, format, most_new)
        )

    def _engine(self) -> Engine:
        engine = self._service.engine
        if engine is None:
            raise Invalid("this run labels texts; use /v1/classify or /v1/embeddings", code="no_language_model")
        return engine

    async def _respond(self, request: Request, answer: Answer) -> Response:
        """Submits an answer's sequences, and responds with the complete answer or a stream."""
        engine, loop = self._engine(), asyncio.get_running_loop()
        rows = answer.rows()
        if len(rows) > protocol.MOST_SEQUENCES:
            raise Invalid(f"{len(rows)} sequences: prompts times n must be at most {protocol.MOST_SEQUENCES}", "n")
        for row in rows:
            self._service.check(row)
        if answer.form is not None:
            await asyncio.to_thread(self._service.constrain, rows, answer.form, answer.before)
        updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()

        def listener(index: int) -> Callable[[Update], None]:
            def put(update: Update) -> None:
                with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits for the update
                    loop.call_soon_threadsafe(updates.put_nowait, (index, update))

            return put

        seconds, tokenizer = self._config.max_seconds, self._service.tokenizer
        jobs = [Job(row, tokenizer, seconds, listener(index)) for index, row in enumerate(rows)]
        engine.submit(jobs)
        for prompt in answer.prompts:
            self._service.metrics.prompt(len(prompt))
        try:
            first = index, update = await unless_left(request, updates.get())
            _raise(update)
            if answer.stream:
                return Stream(events(answer, first, updates, len(jobs)), lambda: engine.cancel(jobs))
            left = len(jobs)
            while True:
                answer.take(index, update)
                left -= update.finish is not None
                if not left:
                    return JSONResponse(answer.whole())
                index, update = await unless_left(request, updates.get())
                _raise(update)
        except BaseException:
            engine.cancel(jobs)
            raise

    # --- vectors and labels -----------------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        """Embeddings of texts."""
        body = await self._body(request)
        protocol.check_names(body, ("model", "input", "encoding_format", "user", "layer", "pooling", "normalized"))
        protocol.check_model(body, self._service.name)
        encoding = body.get("encoding_format") or "float"
        if encoding not in ("float", "base64"):
            raise Invalid("encoding_format must be float or base64", "encoding_format")
        prompts = await asyncio.to_thread(protocol.read_prompts, body.get("input"), self._service.tokenizer, "input")
        if len(prompts) > protocol.MOST_TEXTS:
            raise Invalid(f"{len(prompts)} texts: at most {protocol.MOST_TEXTS} in one request", "input")
        options = protocol.read_embedding(body)
        check_layer(self._service.run.config.model, options.layer)
        texts = [document(self._service.tokenizer, ids) for ids in prompts]
        for number, ids in enumerate(texts):
            self._service.check_text(number, ids)
        vectors = await self._in_batches(request, texts, lambda part: self._service.embed(part, options))
        data = [
            {"object": "embedding", "index": n, "embedding": objects.embedding(vector_D, encoding)}
            for n, vector_D in enumerate(vectors)
        ]
        count = sum(map(len, prompts))
        used = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "data": data, "model": self._service.name, "usage": used})

    async def classify(self, request: Request) -> Response:
        """Labels of texts."""
        body = await self._body(request)
        protocol.check_names(body, ("model", "input", "part"))
        protocol.check_model(body, self._service.name)
        texts = body.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(text, str) and text.strip() for text in texts)
        ):
            raise Invalid("input must be a text or a list of texts, none empty", "input")
        if len(texts) > protocol.MOST_TEXTS:
            raise Invalid(f"{len(texts)} texts: at most {protocol.MOST_TEXTS} in one request", "input")
        head = self._service.head(protocol.text(body, "part"))
        found = await self._in_batches(request, texts, lambda part: self._service.classify(part, *head))
        rows = [{"index": n} | row for n, row in enumerate(found)]
        return JSONResponse({"object": "list", "data": rows, "model": self._service.name})

    async def _in_batches(self, request: Request, items: list, function: Callable[[list], Iterable]) -> list:
        """Results of all items, in batches; other requests can run between two batches."""
        found, deadline = [], time.monotonic() + self._config.max_seconds
        for first in range(0, len(items), BATCH):
            if time.monotonic() > deadline:
                raise Failure("the request took too long; try again with fewer texts")
            part = items[first : first + BATCH]
            found.extend(await unless_left(request, self._service.compute(function, part)))
        return found


def _host(request: Request) -> str:
    """The host name in the request's `Host` header, without the port."""
    host = request.headers.get("host", "")
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    return name.removeprefix("[").removesuffix("]").lower()


def _raise(update: Update) -> None:
    if update.error is not None:
        raise update.error


def _error(message: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(objects.error_body(message, status, param, code), status)


async def _not_found(request: Request, error: Any) -> Response:
    status = error.status_code
    what = "no such path" if status == 404 else f"method {request.method} is not allowed"
    return _error(f"{what}: {request.url.path}", status)
