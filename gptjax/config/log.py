"""Options of what a run logs, and where its metrics go besides its own files."""

import dataclasses

from gptjax.config.rules import no_effect
from gptjax.errors import UserError

SINK_NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is logged about layers, and the programs that get the rows of metrics.jsonl while the run trains. The run's
    own files are always written."""

    by_layer: bool = False
    """At each logged step, log the gradient norm and the ratio of update to weights of each layer."""
    activations: bool = False
    """At each evaluation, log the RMS of the residual stream and the entropy of attention of each layer, measured on
    the first training sequence (at most 256 tokens)."""
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
        return tuple(name for name in SINK_NAMES if getattr(self, name))
