"""Options of doctor."""

import dataclasses

from gptjax.config.rules import local_folders, usable_paths
from gptjax.config.run import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Places to verify in full; the machine is described in any case."""

    check: tuple[str, ...] = ()
    """Config files, run directories and folders of prepared data; the option's name may be left out."""
    all_data: bool = False
    """Verify every data set in cache_dir too."""
    cache_dir: str = Config.cache_dir
    """Cache of prepared data and compiled programs to look at."""

    def __post_init__(self):
        usable_paths("", self, "check", "cache_dir")
        local_folders("", self, "cache_dir")
