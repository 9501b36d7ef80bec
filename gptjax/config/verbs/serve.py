"""Options of serve."""

import dataclasses
from typing import Literal

from gptjax.config.rules import not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(CheckpointConfig):
    """Serves a trained model over HTTP with OpenAI's API."""

    run_dir: str = ""
    """Run directory of the model."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    model_name: str = ""
    """Name of the model in requests; empty: the name of the run directory."""
    slots: int = 8
    """Number of sequences that are decoded together; each has a KV cache of model.block_size tokens."""
    api_keys: str = ""
    """File with one API key per line; every request must send one of them. Empty: no key is needed."""
    cors_origin: tuple[str, ...] = ()
    """Origins of web pages that may use the server (CORS), such as https://example.org; empty: none."""
    max_body_bytes: int = 1_048_576
    """Largest body of a request, in bytes."""
    max_prompt_tokens: int = 0
    """Longest prompt, in tokens; 0: model.block_size."""
    max_new_tokens: int = 1024
    """Largest number of new tokens of a sequence."""
    max_queue: int = 64
    """Largest number of sequences that wait for a slot; further requests get status 429."""
    max_seconds: float = 300.0
    """Time limit of a request, in seconds. A request that still waits for a slot gets status 503; otherwise the text
    ends at the limit."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matmul operands; on a GPU or TPU also of activations and the KV cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantization of weights. int8: 8 bits with a scale per output; int4: 4 bits with a scale per 32 weights."""

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
        usable_paths("", self, "run_dir", "api_keys")
        positive("", self, "slots", "max_body_bytes", "max_new_tokens", "max_seconds")
        not_negative("", self, "port", "max_prompt_tokens", "max_queue")
        if self.port > 65535:
            raise UserError(f"port={self.port} must lie in [0, 65535]")
        for origin in self.cors_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UserError(f"cors_origin={origin!r} must be an origin such as https://example.org")
