"""The HTTP server under load, over loopback: `python -m bench.serve speed`, `python -m bench.serve soak`.

The model has random weights and a byte tokenizer; texts have a fixed length, so that all runs do the same work. `speed`
prints throughput and latency for several numbers of clients: of a plain loop over one prompt at a time
(`bench/loop_server.py`), of one slot, and of many slots.
`soak` sends good and bad requests and leaves streams, then checks that no slot stays taken, that answers are the same
as at the beginning, and that the process has not grown; its exit status is 1 where one of these fails.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import jax
import numpy as np

from gptjax.checkpoints.run_dir import write_run
from gptjax.config.model import ModelConfig
from gptjax.config.run import Config
from gptjax.config.tokenizer import TokenizerConfig
from gptjax.model.gpt import init_params
from gptjax.text.tokenizers.plain import ByteTokenizer
from tests.server import Served, served

PATH = "v1/completions"
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=64)


def write_model(folder: Path, options: argparse.Namespace) -> Path:
    model = ModelConfig(
        n_layer=options.n_layer,
        n_head=max(1, options.n_embd // 64),
        n_embd=options.n_embd,
        block_size=options.block_size,
        vocab_size=257,
    )
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    write_run(folder, Config(model=model, tokenizer=TokenizerConfig(kind="bytes")), params, ByteTokenizer())
    return folder


def body(number: int, options: argparse.Namespace, **changed) -> dict:
    prompt = "".join(random.Random(number).choices("abcdefgh ", k=options.prompt))
    shared = {"max_tokens": options.new, "ignore_eos": True, "seed": number, "logit_bias": {"120": 1}}
    return {"prompt": prompt} | shared | changed


async def timed(client: httpx.AsyncClient, request: dict) -> tuple[float, list[float], int]:
    """Seconds to the first token, seconds per token between later pieces, and how many tokens came."""
    begin = time.perf_counter()
    first, last, gaps, count = 0.0, begin, [], 0
    async with client.stream("POST", PATH, json=request | {"stream": True, "logprobs": 0}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            new = sum(len(choice["logprobs"]["tokens"]) for choice in json.loads(line[6:])["choices"])
            if not new:
                continue
            now = time.perf_counter()
            if not count:
                first = now - begin
            else:
                gaps.append((now - last) / new)
            last, count = now, count + new
    return first, gaps, count


async def load(url: str, clients: int, requests: int, options: argparse.Namespace) -> dict[str, float]:
    """So many clients, each with one request after the other."""
    numbers, found = iter(range(requests)), []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=LIMITS) as http:

        async def client():
            for number in numbers:
                found.append(await timed(http, body(number, options)))

        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        taken = time.perf_counter() - begin
    first = [row[0] for row in found]
    gaps = [gap for row in found for gap in row[1]]
    return {
        "tokens_per_s": sum(row[2] for row in found) / taken,
        **{f"first_{p}": float(np.percentile(first, p)) for p in (50, 99)},
        **{f"between_{p}": float(np.percentile(gaps, p)) for p in (50, 99)},
    }


def speed(folder: Path, options: argparse.Namespace) -> int:
    run_dir = write_model(folder / "run", options)
    print("| server | clients | tokens/s | first token, ms: median, 99 % | between tokens, ms: median, 99 % |")
    print("|---|---|---|---|---|")
    rates: dict[str, float] = {}
    for name, slots in (("a plain loop", 0), ("1 slot", 1), (f"{options.slots} slots", options.slots)):
        module = "gptjax serve" if slots else "bench.loop_server"
        flags = ("--slots", str(slots), "--max_queue", "1000") if slots else ()
        with served(run_dir, *flags, seconds=600, module=module) as server:
            asyncio.run(load(server.url, options.clients[-1], 2 * max(1, slots), options))  # compiles
            for clients in options.clients:
                found = asyncio.run(load(server.url, clients, options.requests, options))
                times = (f"{1000 * found[f'{what}_{p}']:,.1f}" for what in ("first", "between") for p in (50, 99))
                first, first_99, between, between_99 = times
                rates[name] = found["tokens_per_s"]
                row = f"| {name} | {clients} | {rates[name]:,.0f} | {first}, {first_99} | {between}, {between_99} |"
                print(row, flush=True)
    ratio = rates[f"{options.slots} slots"] / rates["a plain loop"]
    print(f"\nthroughput at {options.clients[-1]} clients: {ratio:.2f} times that of a plain loop")
    return 0


def bad_requests(options: argparse.Namespace) -> list[tuple[bytes, int]]:
    """Bodies and the status of each."""
    good = body(0, options)
    return [
        (b"{", 400),
        (b"[" * 50_000, 400),
        (b"x" * 2_000_000, 413),
        (json.dumps(good | {"max_tokens": -1}).encode(), 400),
        (json.dumps(good | {"prompt": "x" * 100_000}).encode(), 400),
        (json.dumps(good | {"prompt": [1, "a"]}).encode(), 400),
        (json.dumps(good | {"temperature": "hot"}).encode(), 400),
        (json.dumps(good | {"model": "other"}).encode(), 404),
    ]


async def mixed(server: Served, options: argparse.Namespace) -> tuple[Counter[str], list[str]]:
    """Sends requests until their number or the time is used up; returns counts and what was not as expected."""
    counts, problems = Counter[str](), []
    end = time.monotonic() + options.seconds
    leave_every = max(1, options.requests // max(1, options.abandoned))
    bad = itertools.cycle(bad_requests(options))
    numbers = iter(range(options.requests))
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=LIMITS) as http:

        async def client(own: random.Random):
            for number in numbers:
                if time.monotonic() > end:
                    return
                if number % leave_every == 0:
                    async with http.stream("POST", PATH, json=body(number, options, stream=True, n=2)) as response:
                        async for _ in response.aiter_lines():
                            break
                    counts["left within a stream"] += 1
                elif number % 3 == 0:
                    content, status = next(bad)
                    response = await http.post(PATH, content=content, headers={"content-type": "application/json"})
                    counts[f"bad, {response.status_code}"] += 1
                    if response.status_code != status:
                        problems.append(f"status {response.status_code} instead of {status}: {content[:60]!r}")
                else:
                    request = body(number, options, max_tokens=own.randint(1, options.new), stream=number % 2 == 0)
                    response = await http.post(PATH, json=request)
                    counts[f"good, {response.status_code}"] += 1
                    if response.status_code not in (200, 429):
                        problems.append(f"status {response.status_code}: {response.text[:200]}")

        await asyncio.gather(*(client(random.Random(n)) for n in range(options.clients[-1])))
    return counts, problems


def resident(server: Served) -> int:
    """KiB of memory of the server's process."""
    [line] = [line for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1])


def soak(folder: Path, options: argparse.Namespace) -> int:
    run_dir = write_model(folder / "run", options)
    reference = body(0, options, logprobs=2)
    with served(run_dir, "--slots", str(options.slots), "--max_queue", "16", seconds=600) as server:

        def text() -> str:
            return httpx.post(server.url + PATH, json=reference, timeout=600).json()["choices"][0]["text"]

        expected = text()
        small = argparse.Namespace(**vars(options) | {"requests": max(50, options.requests // 10)})
        asyncio.run(mixed(server, small))  # what is compiled and pooled once
        before = resident(server)
        begin = time.monotonic()
        counts, problems = asyncio.run(mixed(server, options))
        taken, after = time.monotonic() - begin, resident(server)
        deadline = time.monotonic() + 30
        while True:
            health = httpx.get(f"{server.url}health").json()
            idle = health["slots_busy"] == health["queue_length"] == 0
            if idle or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if not idle:
            problems.append(f"slots stay taken: {health}")
        if text() != expected:
            problems.append("the same request has another answer than at the beginning")
        if after > 1.1 * before + 20_000:
            problems.append("the process has grown")
        print(f"{sum(counts.values()):,} requests in {taken:.0f} s: {dict(sorted(counts.items()))}")
        print(f"memory {before / 1024:,.0f} MiB before, {after / 1024:,.0f} MiB after; {health}")
        for problem in problems[:20]:
            print(f"PROBLEM: {problem}")
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "soak"))
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=384)
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a request")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="in all, for each number of clients")
    parser.add_argument("--abandoned", type=int, default=200, help="soak: streams that are left")
    parser.add_argument("--seconds", type=float, default=3600, help="soak: longest time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return (speed if options.what == "speed" else soak)(Path(folder), options)


if __name__ == "__main__":
    sys.exit(main())
