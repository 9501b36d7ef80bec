"""Options of where a run's metrics go besides its own files."""

import dataclasses

from gptjax.config.rules import no_effect
from gptjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Programs that get the rows of metrics.jsonl while the run trains. The run's own files are always written."""

    tensorboard: bool = False
    """Write event files for TensorBoard into the folder tensorboard of the run directory; needs the extra
    tensorboard."""
    wandb: bool = False
    """Send to Weights & Biases; WANDB_MODE=offline keeps everything in the run directory; needs the extra wandb."""
    trackio: bool = False
    """Write to trackio's local database, which TRACKIO_DIR names; needs the extra trackio."""
    mlflow: bool = False
    """Send to MLflow at the address MLFLOW_TRACKING_URI; needs the extra mlflow."""
    project: str = "gptjax"
    """Name of the project in wandb and trackio, and of the experiment in MLflow."""

    def __post_init__(self):
        if not self.project.strip():
            raise UserError("log.project is empty; give a name")
        named = self.wandb or self.trackio or self.mlflow
        no_effect("log", self, "project", named, "log.wandb, log.trackio or log.mlflow")

    @property
    def sinks(self) -> tuple[str, ...]:
        """The names of the programs that are turned on."""
        return tuple(field.name for field in dataclasses.fields(self) if getattr(self, field.name) is True)
