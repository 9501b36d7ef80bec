"""Options of prepare."""

import dataclasses
import re

from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What prepare does besides; options of the run follow, as for train."""

    shard: str = ""
    """I/N: only clean part I (from 1) of N of the corpus, into a cache_dir that N machines share; then run prepare
    without it."""

    def __post_init__(self):
        if self.shard and not (
            re.fullmatch(r"\d{1,6}/\d{1,6}", self.shard)
            and 1 <= int(self.shard.split("/")[0]) <= int(self.shard.split("/")[1])
        ):
            raise UserError(f"shard={self.shard!r} must be like 1/4: a number from 1 and the number of machines")
