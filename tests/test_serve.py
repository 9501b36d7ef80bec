"""The HTTP server: its answers are those of the same model without it, and no client keeps a slot."""

import asyncio
import base64
import dataclasses
import gc
import json
import re
import signal
import socket
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.api import Model
from gptjax.checkpoints.run_dir import LoadedRun, write_run
from gptjax.cli import main
from gptjax.config.data import DataConfig
from gptjax.config.run import Config
from gptjax.config.task import TaskConfig
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.config.verbs.sample import SampleConfig
from gptjax.config.verbs.serve import ServeConfig
from gptjax.errors import UserError
from gptjax.evaluation.embeddings import EmbeddingOptions
from gptjax.generation.sample import samples
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.server import served, wait_for
from tests.test_chat import make_run
from tests.test_chat import options as chat_options
from tests.tiny import init_all

for module in ("starlette", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(module, reason="needs the packages of gptjax[serve]")

from starlette.testclient import TestClient  # noqa: E402

from gptjax.serving.app import make_app  # noqa: E402
from gptjax.serving.conversation import Conversation  # noqa: E402
from gptjax.serving.service import Service  # noqa: E402
from gptjax.verbs.serve import read_keys  # noqa: E402

NAME = "tiny"
LETTERS = {str(token): 40 for token in range(97, 107)}
"""A bias to letters, so that texts can be read."""
PLAIN = {"prompt": "abc", "max_tokens": 6, "temperature": 0}


def serve_config(**changed) -> ServeConfig:
    return ServeConfig(**{"run_dir": "r", "slots": 3, "max_new_tokens": 100} | changed)


def make_client(run: LoadedRun, config: ServeConfig, keys=()) -> TestClient:
    return TestClient(make_app(Service(run, NAME, config), config, keys), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def client():
    with make_client(make_run(), serve_config()) as client:
        yield client


def complete(client, **body) -> dict:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(client, path, **body) -> list[dict]:
    """The events of a stream, which ends in [DONE]."""
    response = client.post(path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def sampled(prompts, **options):
    run = make_run()
    return samples(run.config.model, run.params, run.tokenizer, prompts, SampleConfig(**options))


def test_completions_are_those_of_sampling(client):
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 5}
    body = options | {"max_tokens": 7, "n": 2, "logit_bias": LETTERS}
    found = complete(client, prompt=["abc", "hello"], **body)
    bias = tuple(f"{token}={value}" for token, value in LETTERS.items())
    expected = sampled(["abc", "hello"], max_new_tokens=7, num_samples=2, logit_bias=bias, **options)
    flat = [sample for row in expected for sample in row]
    assert [choice["text"] for choice in found["choices"]] == [sample.text for sample in flat]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"]["prompt_tokens"] == 8
    assert found["usage"]["completion_tokens"] == sum(len(sample.tokens) for sample in flat)
    by_ids = complete(client, prompt=[list(b"abc"), list(b"hello")], **body)
    assert by_ids["choices"] == found["choices"]
    assert complete(client, prompt=list(b"abc"), **body)["choices"] == found["choices"][:2]


def test_an_answer_does_not_depend_on_what_else_is_decoded(client):
    bodies = [
        {"prompt": "abc" * n, "max_tokens": 4 + 3 * n, "seed": n, "top_p": 1 - n / 20, "logit_bias": LETTERS}
        for n in range(1, 9)
    ]
    bodies[3] |= {"frequency_penalty": 1.5, "presence_penalty": -0.5, "logprobs": 3, "repetition_penalty": 1.2}
    alone = [complete(client, **body)["choices"] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: complete(client, **body)["choices"], bodies))
    for one, other in zip(alone, together, strict=True):
        assert one[0]["text"] == other[0]["text"]


def test_penalties_change_what_is_written(client):
    shared = {"prompt": "a", "max_tokens": 30, "temperature": 0, "logit_bias": LETTERS}
    texts = {complete(client, **shared, **more)["choices"][0]["text"] for more in ({}, {"frequency_penalty": 5})}
    assert len(texts) == 2


def test_a_stream_joins_to_the_whole(client):
    body = {"prompt": "abc", "max_tokens": 20, "seed": 1, "n": 2, "logprobs": 2, "logit_bias": LETTERS}
    whole = complete(client, **body)
    *chunks, last = events(client, "/v1/completions", **body, stream_options={"include_usage": True})
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert len(mine) > 1 and "".join(c["text"] for c in mine) == choice["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            joined = [value for c in mine for value in c["logprobs"][name]]
            assert len(joined) == len(values)
            for one, other in zip(
                joined, values, strict=True
            ):  # another slot may have read the prompt in a larger chunk
                assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float | dict) else other)


def test_stop_strings_and_limits_end_a_text(client):
    shared = {"prompt": "abc", "temperature": 0.8, "seed": 2, "logit_bias": LETTERS}
    whole = complete(client, **shared, max_tokens=24)["choices"][0]
    assert whole["finish_reason"] == "length"
    stop = whole["text"][9:12]
    cut = complete(client, **shared, max_tokens=24, stop=["zzz", stop])["choices"][0]
    assert cut["text"] == whole["text"][: whole["text"].index(stop)] and cut["finish_reason"] == "stop"


def test_echo_scores_the_prompt_as_the_model_does(client):
    prompt = "some text"
    model = Model(make_run())
    logits = np.asarray(model.logits(list(prompt.encode())), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [log_p[t, token] for t, token in enumerate(prompt.encode()[1:])]
    for more in ({"max_tokens": 0}, {"max_tokens": 2, "temperature": 0, "logit_bias": LETTERS}):
        [choice] = complete(client, prompt=prompt, echo=True, logprobs=1, **more)["choices"]
        found = choice["logprobs"]
        assert choice["text"].startswith(prompt) and found["token_logprobs"][0] is None
        np.testing.assert_allclose(found["token_logprobs"][1 : len(prompt)], expected, atol=1e-4)
        assert found["text_offset"] == list(range(len(prompt) + more["max_tokens"]))
        best = [max(row.values()) for row in found["top_logprobs"][1 : len(prompt)]]
        np.testing.assert_allclose(best, log_p[: len(prompt) - 1].max(-1), atol=1e-4)
    assert complete(client, prompt=prompt, echo=True, max_tokens=0)["choices"][0]["text"] == prompt


def test_a_chat_is_answered_as_in_a_conversation(client):
    options = chat_options(seed=4)
    conversation = Conversation(make_run(), options, "be brief")
    expected = "".join(conversation.answer("hi"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": 12, "seed": 4, "logit_bias": LETTERS, "logprobs": True}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected}
    first, *chunks, last = events(client, "/v1/chat/completions", **body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected
    assert last["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"


def test_an_answer_has_the_form_that_is_asked_for(client):
    pytest.importorskip("llguidance", reason="needs the package of gptjax[constrain]")
    schema = {
        "type": "object",
        "properties": {"n": {"enum": [1, 22]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 40, "response_format": asked}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    assert json.loads(choice["message"]["content"])["n"] in (1, 22) and choice["finish_reason"] == "stop"
    for choice in complete(client, prompt="a", max_tokens=20, n=3, regex="x[yz]{2}")["choices"]:
        assert re.fullmatch("x[yz]{2}", choice["text"])


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [999]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x" * 129}, 400, "prompt"),
        ("/v1/completions", {"prompt": "x" * 100, "max_tokens": 40}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 101}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "x", "top_p": 2}, 400, "top_p"),
        ("/v1/completions", {"prompt": "x", "n": 200}, 400, "n"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"a": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"prompt": "x", "best_of": 3}, 400, "best_of"),
        ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "temprature"),
        ("/v1/completions", {"prompt": "x", "model": "gpt-4"}, 404, "model"),
        ("/v1/completions", {"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "xml"}}, 400, "response_format"),
        ("/v1/completions", {"prompt": "x", "regex": "a", "response_format": {"type": "json_object"}}, 400, "regex"),
        ("/v1/completions", {"prompt": "x", "regex": "(a"}, 400, None),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "cat", "content": "x"}]}, 400, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": {}}]}, 400, "messages[0].content"),
        ("/v1/embeddings", {"input": ["a", "x" * 128]}, 400, "input"),
        ("/v1/embeddings", {"input": "a", "pooling": "max"}, 400, "pooling"),
        ("/v1/embeddings", {"input": "a", "layer": 7}, 400, None),
        ("/v1/classify", {"input": "a"}, 400, None),
        ("/detokenize", {"tokens": ["a", "b"]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
    ],
)
def test_a_wrong_request_is_refused_in_the_form_of_openais_api(client, path, body, status, param):
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_json_or_too_large_are_refused(client):
    def status(content, kind="application/json"):
        response = client.post("/v1/completions", content=content, headers={"content-type": kind})
        assert set(response.json()) == {"error"}
        return response.status_code

    assert status(b"{") == status(b"[1]") == status(b'{"prompt": NaN}') == status(b"[" * 100_000) == 400
    assert status(b'{"prompt": "\\ud800"}') == status(b'{"prompt": "x", "temperature": 1e999}') == 400
    assert status(b'{"prompt": "x"}', "text/plain") == 415
    assert status(b'{"prompt": "' + b"x" * 2_000_000) == 413
    assert client.get("/v1/completions").status_code == 405 and client.get("/nothing").status_code == 404


def test_names_of_other_sites_do_not_reach_a_local_server(client):
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/health", headers={"host": "[::1"}).status_code == 421
    for host in ("localhost:8000", "127.0.0.1", "[::1]:80", "[::1]"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://a.b"}).headers


def test_keys_and_origins_are_those_of_the_options(tmp_path):
    (tmp_path / "keys").write_text("\nsecret-1\n secret-2\n")
    keys = read_keys(str(tmp_path / "keys"))
    config = serve_config(host="0.0.0.0", cors_origin=("https://a.example",))
    with make_client(make_run(), config, keys) as client:
        for given, status in (("", 401), ("Bearer secret", 401), ("Bearer sécret", 401), ("Bearer secret-2", 200)):
            response = client.get("/v1/models", headers={"authorization": given.encode("latin-1")})
            assert response.status_code == status
        assert client.get("/health").status_code == client.get("/").status_code == 200
        assert client.get("/metrics").status_code == 401
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            headers = client.get("/health", headers={"origin": origin}).headers
            assert headers.get("access-control-allow-origin") == allowed
    (tmp_path / "none").write_text("\n")
    with pytest.raises(UserError, match="holds no key"):
        read_keys(str(tmp_path / "none"))


def test_what_does_not_fit_into_the_queue_is_refused_and_what_waits_too_long_ends():
    config = serve_config(slots=1, max_queue=1, max_seconds=0.6, max_prompt_tokens=5)
    with make_client(make_run(), config) as client:
        complete(client, **PLAIN)
        assert client.post("/v1/completions", json={"prompt": "x" * 6}).status_code == 400
        engine = client.app.state.service.engine
        step = engine._decoder.step
        engine._decoder.step = lambda *given: (time.sleep(0.2), step(*given))[1]
        body = {"prompt": "a", "max_tokens": 100, "seed": 1, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            begin = time.monotonic()
            first = pool.submit(client.post, "/v1/completions", json=body)
            wait_for(lambda: engine.busy == 1)
            second = pool.submit(client.post, "/v1/completions", json=body)
            wait_for(lambda: engine.waiting == 1)
            third = client.post("/v1/completions", json=body)
        assert third.status_code == 429 and third.headers["retry-after"] == "1"
        assert first.result().json()["choices"][0]["finish_reason"] == "length"
        assert 0 < first.result().json()["usage"]["completion_tokens"] < 100
        assert second.result().status_code in (200, 503) and time.monotonic() - begin < 5
        assert engine.busy == engine.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("sends", [0, 2])
def test_a_client_that_leaves_frees_its_slot(client, stream, sends):
    engine, sent, left = client.app.state.service.engine, [], asyncio.Event
    body = {"prompt": "abc", "max_tokens": 100, "ignore_eos": True, "stream": stream, "n": 2}

    async def talk():
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        gone = left()

        async def receive():
            if messages:
                return messages.pop()
            if sends and stream:
                await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if len(sent) > sends:
                gone.set()
                await asyncio.sleep(0.01)

        headers = [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")]
        scope = {
            **{"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"},
            **{"query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http"},
            **{
                "server": ("127.0.0.1", 80),
                "client": ("127.0.0.1", 9),
                "asgi": {"version": "3.0", "spec_version": "2.3"},
            },
        }
        await client.app(scope, receive, send)

    step, steps = engine._decoder.step, []

    def slow_step(*given):
        steps.append(time.sleep(0.02))
        return step(*given)

    engine._decoder.step = slow_step
    try:
        asyncio.run(asyncio.wait_for(talk(), 20))
        before = len(steps)
        assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
        wait_for(lambda: engine.busy == 0 and engine.waiting == 0)
        assert len(steps) - before <= 3  # 7 are needed to finish
    finally:
        engine._decoder.step = step
    complete(client, **PLAIN)


def test_an_error_while_decoding_ends_the_requests_in_slots_alone(client, capsys):
    engine = client.app.state.service.engine
    before = complete(client, **PLAIN)["choices"]

    def fail(*_given):
        raise RuntimeError("out of memory")

    engine._decoder.step = fail
    response = client.post("/v1/completions", json=PLAIN)
    assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
    assert "out of memory" in capsys.readouterr().err
    assert complete(client, **PLAIN)["choices"] == before


def test_closing_finishes_what_runs():
    with make_client(make_run(), serve_config()) as client:
        found = []
        body = {"prompt": "abc", "max_tokens": 60, "ignore_eos": True, "seed": 1}
        thread = threading.Thread(target=lambda: found.append(complete(client, **body)))
        thread.start()
        engine = client.app.state.service.engine
        wait_for(lambda: engine.busy == 1)
        client.app.state.service.close()
        thread.join()
        assert found[0]["usage"]["completion_tokens"] >= 59
        assert client.post("/v1/completions", json=PLAIN).status_code == 503
        assert client.get("/health").status_code == 503


def test_embeddings_are_those_of_the_model(client):
    model, texts = Model(make_run()), ["abc", "some words"]
    found = client.post("/v1/embeddings", json={"input": texts}).json()
    np.testing.assert_allclose(
        [row["embedding"] for row in found["data"]], model.embed(texts, normalized=True), atol=1e-5
    )  # sums in another order
    assert found["usage"]["prompt_tokens"] == 13
    for layer in (0, 1):
        body = {"input": "abc", "encoding_format": "base64", "pooling": "last", "layer": layer, "normalized": False}
        [row] = client.post("/v1/embeddings", json=body).json()["data"]
        vector = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
        expected = model.embed("abc", "last", layer=layer)
        np.testing.assert_allclose(vector, expected, atol=1e-5 * np.abs(expected).max())


def test_the_server_has_one_copy_of_the_blocks():
    run = make_run()
    run = dataclasses.replace(run, params=jax.tree.map(jnp.copy, run.params))
    blocks = [weakref.ref(leaf) for leaf in jax.tree.leaves(run.params["blocks"]) if leaf.ndim > 2]
    service = Service(run, "test", ServeConfig(run_dir="x"))
    assert blocks and all(block() is not None for block in blocks)
    del run
    gc.collect()
    assert all(block() is None for block in blocks)
    assert service.embed([np.arange(3)], EmbeddingOptions()).shape == (1, service.run.config.model.n_embd)


def test_a_run_that_classifies_gives_labels():
    base = make_run().config
    task = TaskConfig(kind="classify", labels=("ham", "spam", "eggs"))
    config = Config(
        model=base.model, task=task, tokenizer=TokenizerConfig(kind="bytes"), data=DataConfig(path=("unused",))
    )
    run = LoadedRun(config, init_all(config, jax.random.key(0)), ByteTokenizer(), 0)
    texts = [f"text {n} " * (1 + n % 3) for n in range(18)]
    expected = Model(run).predict(texts)
    with make_client(run, serve_config()) as client:
        found = client.post("/v1/classify", json={"input": texts}).json()["data"]
        assert [row["predicted"] for row in found] == [row["predicted"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert client.post("/v1/completions", json=PLAIN).status_code == 400
        assert client.get("/v1/models").json()["data"][0]["endpoints"] == ["classify", "embeddings"]


def test_models_tokens_and_counts(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["context_length"]) == (NAME, 128)
    assert client.get(f"/v1/models/{NAME}").json() == model and client.get("/v1/models/x").status_code == 404
    tokens = client.post("/tokenize", json={"prompt": "aé"}).json()
    assert tokens["tokens"] == [97, 195, 169] and tokens["token_strs"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert client.post("/tokenize", json={"prompt": "<|endoftext|>"}).json()["tokens"] == [256]
    assert client.post("/tokenize", json={"prompt": "<|endoftext|>!"}).json()["count"] == 14
    assert client.post("/detokenize", json={"tokens": [97, 98]}).json() == {"prompt": "ab"}

    def count(name):
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = ("gptjax_generated_tokens_total", "gptjax_prompt_tokens_total", 'gptjax_requests_total{path="/tokenize"')
    before = [count(name) for name in names]
    complete(client, **PLAIN | {"ignore_eos": True})
    client.post("/tokenize", json={"prompt": "a"})
    after = [count(name) for name in names]
    assert after[1:] == [before[1] + 3, before[2] + 1] and after[0] >= before[0] + 6


def test_a_model_without_chats_has_no_chat_endpoint():
    run = make_run()
    plain = dataclasses.replace(run, config=dataclasses.replace(run.config, task=TaskConfig()))
    with make_client(plain, serve_config()) as client:
        response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
        assert response.status_code == 400 and response.json()["error"]["code"] == "no_chat_template"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run, folder = make_run(), tmp_path_factory.mktemp("serve") / "tiny"
    write_run(folder, run.config, run.params, run.tokenizer)
    return folder


@pytest.fixture(scope="module")
def server(run_dir):
    with served(run_dir) as server:
        yield server


@pytest.fixture(scope="module")
def lm_eval():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("tenacity", reason="needs lm-eval[api]")
        return pytest.importorskip("lm_eval", reason="needs lm-eval[api]")


@pytest.fixture(scope="module")
def openai():
    return pytest.importorskip("openai")


def test_lm_eval_measures_a_served_model(lm_eval, server):
    """Log-likelihoods are those of the model, without a tokenizer of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.instance import Instance
        from lm_eval.models.openai_completions import LocalCompletionsAPI

        lm = LocalCompletionsAPI(base_url=f"{server.url}v1/completions", model="tiny", max_length=128)
        pairs = [("a text", " that goes"), ("b", "c"), ("", "alone")]
        requests = [Instance("loglikelihood", {}, pair, n, ("t", n, 1)) for n, pair in enumerate(pairs)]
        found = lm.loglikelihood(requests, disable_tqdm=True)
        until = {"until": ["\n"], "max_gen_toks": 8, "temperature": 0}
        [text] = lm.generate_until([Instance("generate_until", {}, ("abc", until), 0, ("t", 0, 1))], disable_tqdm=True)
    model = Model(make_run())
    for (context, rest), (score, greedy) in zip(pairs, found, strict=True):
        before = list(context.encode()) or [256]
        ids = [*before, *rest.encode()]
        logits = np.asarray(model.logits(ids), np.float64)[len(before) - 1 : -1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(rest))
        assert score == pytest.approx(log_p[places, ids[len(before) :]].sum(), abs=1e-3)
        assert greedy == bool((log_p.argmax(-1) == ids[len(before) :]).all())
    [[expected]] = sampled(["abc"], max_new_tokens=8, temperature=0, stop=("\n",))
    assert text == expected.text


def test_openais_client_is_served_and_what_runs_finishes_when_the_server_is_stopped(openai, server):
    """The last one with this server, which has ended after it."""
    with openai.OpenAI(base_url=f"{server.url}v1", api_key="none", max_retries=0) as api:
        assert [model.id for model in api.models.list()] == ["tiny"]
        text = api.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0).choices[0].text
        [[expected]] = sampled(["abc"], max_new_tokens=6, temperature=0)
        assert text == expected.text
        assert len(api.embeddings.create(model="tiny", input=["a", "b"]).data[1].embedding) == 16
        with pytest.raises(openai.BadRequestError) as error:
            api.completions.create(model="tiny", prompt="", max_tokens=6)
        assert error.value.param == "prompt"
        stream = api.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=100,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(stream)]
        server.process.send_signal(signal.SIGTERM)
        chunks += stream
    assert chunks[-1].choices[0].finish_reason is not None
    assert server.process.wait(60) == 128 + signal.SIGTERM
    assert not any("Traceback" in line for line in server.lines), server.lines


def test_runs_and_options_that_cannot_be_served_are_refused():
    run, config = make_run(), serve_config()
    with pytest.raises(UserError, match=r"max_prompt_tokens=129 has no effect: .* model\.block_size=128"):
        Service(run, NAME, serve_config(max_prompt_tokens=129))
    regress = dataclasses.replace(run, config=dataclasses.replace(run.config, task=TaskConfig(kind="regress")))
    with pytest.raises(UserError, match=r"task\.kind=regress: chat and serve need a run that learned to write text"):
        Service(regress, NAME, config)


def test_an_address_that_is_taken_is_told_in_one_line(run_dir, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--run_dir", str(run_dir), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: cannot be listened on" in capsys.readouterr().err
