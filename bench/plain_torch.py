"""GPT-2 and Llama in plain PyTorch, as a careful user of PyTorch writes them: the fastest peers of gptjax.

Attention is `scaled_dot_product_attention` (causal), and biases are optional. The loss is that of the next token.

Shape suffixes: B batch, T position, D n_embd, H query head, G key and value head, C head_dim, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from work import Training


def rotate(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864): channel i pairs with channel i + half."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return x_BHTC * cos_TC + torch.cat((-second, first), dim=-1) * sin_TC


class Block(nn.Module):
    """One layer: attention, then the MLP, each after a norm and added to the residual stream."""

    def __init__(self, work: Training):
        super().__init__()
        D, self.n_head, self.n_kv_head = work.n_embd, work.n_head, work.n_kv_head or work.n_head
        C = D // work.n_head
        self.modern, bias = work.modern, not work.modern
        norm = (lambda: nn.RMSNorm(D, eps=1e-5)) if work.modern else (lambda: nn.LayerNorm(D))
        self.norm_1, self.norm_2 = norm(), norm()
        self.qkv = nn.Linear(D, (work.n_head + 2 * self.n_kv_head) * C, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)
        self.up = nn.Linear(D, work.mlp_width * (2 if work.modern else 1), bias=bias)
        self.down = nn.Linear(work.mlp_width, D, bias=bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        B, T, D = x_BTD.shape
        C = D // self.n_head
        heads = self.qkv(self.norm_1(x_BTD)).view(B, T, -1, C).transpose(1, 2)
        q_BHTC, k_BGTC, v_BGTC = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if rope is not None:
            q_BHTC, k_BGTC = rotate(q_BHTC, *rope), rotate(k_BGTC, *rope)
        grouped = self.n_kv_head < self.n_head
        mixed = F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=grouped)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        hidden = self.up(self.norm_2(x_BTD))
        if self.modern:
            gate, value = hidden.chunk(2, dim=-1)
            return x_BTD + self.down(F.silu(gate) * value)
        return x_BTD + self.down(F.gelu(hidden, approximate="tanh"))


class Decoder(nn.Module):
    """GPT-2 (learned positions, tied output), or with `work.modern` Llama (RoPE, RMSNorm, SwiGLU, no biases)."""

    def __init__(self, work: Training):
        super().__init__()
        self.tokens = nn.Embedding(work.vocab_size, work.n_embd)
        self.places = None if work.modern else nn.Embedding(work.block_size, work.n_embd)
        self.blocks = nn.ModuleList(Block(work) for _ in range(work.n_layer))
        self.norm = nn.RMSNorm(work.n_embd, eps=1e-5) if work.modern else nn.LayerNorm(work.n_embd)
        self.head = nn.Linear(work.n_embd, work.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        half = torch.arange(0, work.n_embd // work.n_head, 2) / (work.n_embd // work.n_head)
        angles = torch.outer(torch.arange(work.block_size), 10_000.0**-half).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns logits `[B, T, V]` of token ids `[B, T]`."""
        T, x_BTD = input_ids.shape[1], self.tokens(input_ids)
        rope = None
        if self.places is not None:
            x_BTD = x_BTD + self.places(torch.arange(T, device=input_ids.device))
        else:
            rope = self.cos[:T].to(x_BTD.dtype), self.sin[:T].to(x_BTD.dtype)
        for block in self.blocks:
            x_BTD = block(x_BTD, rope)
        return self.head(self.norm(x_BTD))
