"""The work that is timed, the same for gptjax and its peers."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Training:
    """One training step, with dropout 0, of GPT-2, or of Llama where `modern` is set."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    modern: bool = False
    """RMSNorm, SwiGLU, RoPE, no biases."""
    n_kv_head: int = 0
    """Heads of keys and values; 0: n_head."""

    @property
    def mlp_width(self) -> int:
        """Width of the MLP; of Llama two thirds, since it has three matrices instead of two."""
        return 4 * self.n_embd * 2 // 3 if self.modern else 4 * self.n_embd

    @property
    def tokens(self) -> int:
        return self.batch_size * self.block_size

    @property
    def flops_per_token(self) -> float:
        """PaLM's count (arXiv:2204.02311, appendix B): six per multiplied parameter, and whole attention windows."""
        heads = 2.0 + 2.0 * (self.n_kv_head or self.n_head) / self.n_head
        layer = heads * self.n_embd**2 + (3 if self.modern else 2) * self.n_embd * self.mlp_width
        multiplied = self.n_layer * layer + self.n_embd * self.vocab_size
        return 6.0 * multiplied + 12.0 * self.n_layer * self.n_embd * self.block_size


TRAINING = {
    "small": Training(4, 4, 128, 64, 12, 65),
    "medium": Training(6, 6, 384, 256, 16, 65),
    "124m": Training(12, 12, 768, 512, 4, 50257),
    "llama": Training(12, 12, 768, 512, 4, 50257, modern=True, n_kv_head=4),
    "llama_gpu": Training(12, 12, 768, 1024, 32, 50257, modern=True, n_kv_head=4),
    "124m_gpu": Training(12, 12, 768, 1024, 32, 50257),
    "350m_gpu": Training(24, 16, 1024, 1024, 16, 50257),
    **{f"long_{T}": Training(6, 6, 384, T, 4096 // T, 65) for T in (256, 512, 1024, 2048, 4096)},
}
WHOLE_STEPS, WHOLE_EVAL_EVERY, WHOLE_EVAL_WINDOWS = 2000, 250, 512  # those of configs/shakespeare_cpu.yaml
GENERATION = Training(12, 12, 768, 1024, 1, 50257)
NEW_TOKENS = 128
PROMPT_TOKENS = 16
