"""Options of prepare."""

import dataclasses
import re

from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Additional options of prepare; options of the run may follow, as for train."""

    shard: str = ""
    """Share of the corpus to clean, as I/N: only share I (from 1) of N, into a cache_dir that N machines have in
    common. Afterwards run prepare without this option. Empty: prepare everything."""

    def __post_init__(self):
        if self.shard and not (
            re.fullmatch(r"\d{1,6}/\d{1,6}", self.shard)
            and 1 <= int(self.shard.split("/")[0]) <= int(self.shard.split("/")[1])
        ):
            raise UserError(f"shard={self.shard!r} must be like 1/4: a number from 1 and the number of machines")
