"""Times PyTorch with the same arguments as ours.py.

The last argument is the way: eager or compile (of `transformers`), plain_eager or plain_compile (of plain_torch.py).
"""

import json
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from plain_torch import Decoder
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from work import (
    GENERATION,
    NEW_TOKENS,
    PROMPT_TOKENS,
    TRAINING,
    WHOLE_EVAL_EVERY,
    WHOLE_EVAL_WINDOWS,
    WHOLE_STEPS,
    Training,
)

warnings.filterwarnings("ignore")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_llama(work: Training) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=work.n_layer,
        num_attention_heads=work.n_head,
        num_key_value_heads=work.n_kv_head,
        hidden_size=work.n_embd,
        intermediate_size=work.mlp_width,
        max_position_embeddings=work.block_size,
        rms_norm_eps=1e-5,
        vocab_size=work.vocab_size,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(DEVICE)


def make_model(work: Training) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=work.n_layer,
        n_head=work.n_head,
        n_embd=work.n_embd,
        n_positions=work.block_size,
        vocab_size=work.vocab_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPT2LMHeadModel(config).to(DEVICE)


def next_token_loss(run, windows):
    logits = run(input_ids=windows[:, :-1])
    logits = logits if isinstance(logits, torch.Tensor) else logits.logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def make_training(work: Training, dtype: str, mode: str):
    """Model, optimizer, the model as it is called, and `step(windows [B, T + 1]) -> loss`."""
    if mode.startswith("plain"):
        torch.manual_seed(0)
        model = Decoder(work).to(DEVICE)
    else:
        model = make_llama(work) if work.modern else make_model(work)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    run = torch.compile(model) if mode.endswith("compile") else model

    def step(windows):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = next_token_loss(run, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return model, optimizer, run, step


def train(name: str, dtype: str, steps: int, mode: str) -> dict:
    work = TRAINING[name]
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    step = make_training(work, dtype, mode)[-1]
    times = []
    shape = (work.batch_size, work.block_size + 1)
    for i in range(steps + 3):
        inputs = torch.from_numpy(np.random.default_rng(i).integers(0, work.vocab_size, shape))
        started = time.perf_counter()
        loss = step(inputs.to(DEVICE))
        if DEVICE == "cpu" or i < 3:
            loss.item()
        times.append(time.perf_counter() - started)
    if DEVICE == "cuda":
        times = pipelined(step, work, steps)
    return {"times": times[-steps:], "work": work.tokens, "peak_bytes": peak_bytes()}


def pipelined(step, work: Training, steps: int) -> list[float]:
    shape = (work.batch_size, work.block_size + 1)
    batches = [torch.randint(0, work.vocab_size, shape, device=DEVICE) for _ in range(4)]
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for i in range(steps):
            step(batches[i % 4])
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / steps)
    return times


def generate(sequences: str, dtype: str, repeats: int, mode: str) -> dict:
    work = GENERATION
    model = make_model(work).eval().to(getattr(torch, dtype))
    if mode == "compile":
        model.forward = torch.compile(model.forward)
    shape = (int(sequences), PROMPT_TOKENS)
    prompts = torch.from_numpy(np.random.default_rng(0).integers(0, work.vocab_size, shape)).to(DEVICE)
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        times.append(time.perf_counter() - started)
    assert out.shape[1] == PROMPT_TOKENS + NEW_TOKENS
    return {"times": times[1:], "work": int(sequences) * NEW_TOKENS, "peak_bytes": peak_bytes()}


def whole(_preset: str, dtype: str, repeats: int, mode: str) -> dict:
    """Seconds from the start of the process to its end: the steps and evaluations of configs/shakespeare_cpu.yaml."""
    times = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "shakespeare", "small", dtype, "0", mode]
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        times.append(time.perf_counter() - started)
        result = json.loads(done.stdout.splitlines()[-1])
    return result | {"times": times}


def shakespeare(name: str, dtype: str, _count: str, mode: str) -> dict:
    """Trains on the characters of a text as nanoGPT's example for a CPU does; evaluates on fixed windows."""
    work = TRAINING[name]
    path = os.environ.get("BENCH_TEXT", str(Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"))
    text = Path(path).read_text(encoding="utf-8")
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    data = torch.tensor([ids[character] for character in text])
    held_out, data = data[int(0.9 * len(data)) :], data[: int(0.9 * len(data))]
    torch.manual_seed(0)
    _, optimizer, run, step = make_training(work, dtype, mode)
    T, B, peak = work.block_size, work.batch_size, 1e-3

    def windows(source, starts):
        return torch.stack([source[s : s + T + 1] for s in starts])

    fixed = torch.linspace(0, len(held_out) - T - 1, WHOLE_EVAL_WINDOWS).long().split(B)
    for i in range(WHOLE_STEPS):
        share = (i - 100) / (WHOLE_STEPS - 100)
        rate = peak * (i + 1) / 101 if i < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * (peak - 1e-4)
        for group in optimizer.param_groups:
            group["lr"] = rate
        step(windows(data, torch.randint(len(data) - T - 1, (B,)))).item()
        if (i + 1) % WHOLE_EVAL_EVERY == 0:
            with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                losses = [next_token_loss(run, windows(held_out, starts)).item() for starts in fixed]
    return {"work": WHOLE_STEPS * work.tokens, "peak_bytes": peak_bytes(), "val_loss": sum(losses) / len(losses)}


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    verb, name, dtype, count, mode = sys.argv[1:]
    verbs = {"train": train, "generate": generate, "whole": whole, "shakespeare": shakespeare}
    print(json.dumps(verbs[verb](name, dtype, int(count), mode)))
