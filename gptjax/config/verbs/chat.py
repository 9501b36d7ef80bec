"""Options of chat."""

import dataclasses

from gptjax.config.verbs.decoding import DecodingConfig
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(DecodingConfig):
    """An interactive chat with a trained model."""

    system: str = ""
    """Text of the system message, which is the first message; empty: none."""

    def __post_init__(self):
        super().__post_init__()
        if not self.run_dir:
            raise UserError("run_dir is missing; name the folder of a trained run")
