"""Options of doctor."""

import dataclasses

from gptjax.config.rules import local_folders, usable_paths
from gptjax.config.run import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Describes the machine, and verifies data and runs completely."""

    check: tuple[str, ...] = ()
    """Config files, run directories and folders of prepared data to verify; the option's name may be omitted."""
    all_data: bool = False
    """Also verify every dataset in cache_dir."""
    cache_dir: str = Config.cache_dir
    """Folder of prepared data and compiled programs to inspect."""

    def __post_init__(self):
        usable_paths("", self, "check", "cache_dir")
        local_folders("", self, "cache_dir")
