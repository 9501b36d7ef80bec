"""Options of logging, and of programs that receive a run's metrics."""

import dataclasses

from gptjax.config.rules import no_effect
from gptjax.errors import UserError

SINK_NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics of layers, and programs that receive the metrics during training. metrics.jsonl is always written."""

    by_layer: bool = False
    """At each logged step, log the gradient norm and the update-to-weight ratio of each layer."""
    activations: bool = False
    """At each evaluation, log the RMS of the residual stream and the attention entropy of each layer, measured on the
    first training sequence (at most 256 tokens)."""
    tensorboard: bool = False
    """Write event files for TensorBoard into the folder tensorboard of the run directory; needs the extra
    tensorboard."""
    wandb: bool = False
    """Send metrics to Weights & Biases; with WANDB_MODE=offline they stay in the run directory. Needs the extra
    wandb."""
    trackio: bool = False
    """Write metrics to trackio's local database (folder: TRACKIO_DIR). Needs the extra trackio."""
    mlflow: bool = False
    """Send metrics to the MLflow server at MLFLOW_TRACKING_URI. Needs the extra mlflow."""
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
