"""Clients of a server that leave, send nonsense or come all at once, over real connections."""

import contextlib
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from tests.faults.inputs import make_run
from tests.server import served, wait_for

httpx = pytest.importorskip("httpx", reason="needs httpx")
for module in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(module, reason="needs the packages of gptjax[serve]")

FAULT = (
    48,
    "clients of a server: gone while it streams, 10 MB of body, bad JSON, negative max_tokens, 20 at once, SIGTERM",
    "4xx or a clean end; no slot stays taken",
)
PATH = "v1/completions"
BODY = {"prompt": "ab", "max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("server") / "run")
    # Without kernels, which would be compiled in an empty cache.
    with served(run_dir, "--slots", "4", "--max_queue", "8", GPTJAX_NATIVE="0") as server:
        yield server


def is_idle(server) -> bool:
    health = httpx.get(f"{server.url}health").json()
    return (health["slots_busy"], health["queue_length"]) == (0, 0)


def post(server, content, **headers) -> int:
    headers = {"content-type": "application/json"} | headers
    response = httpx.post(server.url + PATH, content=content, headers=headers, timeout=60)
    assert response.status_code == 200 or "message" in response.json()["error"]
    return response.status_code


def connect(server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def head(length: int) -> bytes:
    lines = (f"POST /{PATH} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", f"content-length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


@pytest.mark.fault(*FAULT)
def test_bad_requests_are_refused(server, seen):
    bodies = {
        "bad JSON": b'{"prompt": ',
        "no object": b"[]",
        "nested 100,000 times": b"[" * 100_000,
        "half a surrogate": b'{"prompt": "\\ud800"}',
        "negative max_tokens": json.dumps(BODY | {"max_tokens": -5}).encode(),
        "2**70 max_tokens": json.dumps(BODY | {"max_tokens": 2**70}).encode(),
        "temperature of 1e999": b'{"prompt": "ab", "temperature": 1e999}',
        "a prompt longer than the context": json.dumps(BODY | {"prompt": "x" * 1000}).encode(),
    }
    for name, body in bodies.items():
        assert post(server, body) == 400, name
    assert post(server, b"x" * 10_000_000) == 413
    with connect(server) as connection:
        connection.sendall(b"\x16\x03\x01 no HTTP\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert post(server, json.dumps(BODY).encode()) == 200 and is_idle(server)
    seen(f"{', '.join(bodies)}: 400; 10 MB: 413; bytes that are no HTTP: 400; the next request is answered")


@pytest.mark.fault(*FAULT)
def test_clients_that_leave_free_their_slots(server, seen):
    body = json.dumps(BODY | {"stream": True, "max_tokens": 15, "n": 4}).encode()
    for number in range(40):
        with connect(server) as connection:
            connection.sendall(head(len(body)) + body[: len(body) - (number % 4 == 0)])  # some never send all
            if number % 2:
                assert connection.recv(10)
    wait_for(lambda: is_idle(server))
    before = time.monotonic()
    assert post(server, json.dumps(BODY).encode()) == 200 and time.monotonic() - before < 20
    seen("40 clients left, before the body's end, before the answer or within a stream: all slots free, queue empty")


@pytest.mark.fault(*FAULT)
def test_many_at_once_are_answered_or_refused(server, seen):
    body = json.dumps(BODY).encode()
    expected = httpx.post(server.url + PATH, json=BODY, timeout=60).json()["choices"]
    with ThreadPoolExecutor(20) as pool:
        statuses = list(pool.map(lambda _: post(server, body), range(20)))
    assert set(statuses) <= {200, 429} and statuses.count(200) >= 4
    assert httpx.post(server.url + PATH, json=BODY, timeout=60).json()["choices"] == expected
    wait_for(lambda: is_idle(server))
    seen("20 at once with 4 slots and a queue of 8: each gets 200 or 429, and the same text before and after")


@pytest.mark.fault(*FAULT)
def test_a_signal_lets_what_runs_finish(server, seen):
    """The last test: the server has ended after it."""
    found: list[str] = []
    begun = threading.Event()

    def stream():
        body = BODY | {"stream": True, "max_tokens": 15}
        with httpx.stream("POST", server.url + PATH, json=body, timeout=60) as response:
            for line in response.iter_lines():
                found.append(line)
                begun.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert begun.wait(60)
    server.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert "data: [DONE]" in found
    assert server.process.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(OSError), contextlib.closing(connect(server)):
        pass
    assert not any("Traceback" in line for line in server.lines), server.lines
    seen("SIGTERM within a stream: the stream ends with [DONE], new connections are refused, exit status 143")
