"""Options of serve."""

import dataclasses
from typing import Literal

from gptjax.config.rules import not_negative, positive, usable_paths
from gptjax.config.verbs.checkpoint import CheckpointConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig(CheckpointConfig):
    """Serves a trained model over HTTP, in the form of OpenAI's API."""

    run_dir: str = ""
    """Run directory of the model."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only, 0.0.0.0 from everywhere."""
    port: int = 8000
    """Port to listen on; 0: any free one."""
    model_name: str = ""
    """Name of the model in requests; empty: the name of the run directory."""
    slots: int = 8
    """Sequences that are decoded together; each has a cache of model.block_size tokens."""
    api_keys: str = ""
    """File with one API key per line, of which every request must have one; empty: none is needed."""
    cors_origin: tuple[str, ...] = ()
    """Origins of web pages that may use the server, such as https://example.org; none by default."""
    max_body_bytes: int = 1_048_576
    """Largest body of a request."""
    max_prompt_tokens: int = 0
    """Longest prompt; 0: model.block_size."""
    max_new_tokens: int = 1024
    """Largest number of new tokens of a sequence."""
    max_queue: int = 64
    """Sequences that may wait for a slot; requests beyond get status 429."""
    max_seconds: float = 300.0
    """Time limit of a request: one that still waits for a slot gets status 503, the text of others ends there."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matmul operands; on a GPU or TPU also of activations and the cache, which are float32 on a CPU."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """int8: 8 bits a weight, a scale for each output; int4: 4 bits, a scale for each 32."""

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
