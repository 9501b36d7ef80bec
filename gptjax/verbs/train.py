"""`gptjax train`."""

from pathlib import Path

from gptjax.config.run import Config
from gptjax.config.start import CONFIG_FILE, Start, load_run_config
from gptjax.errors import UserError, is_out_of_memory
from gptjax.machine import compile_cache
from gptjax.parallel import cluster
from gptjax.report.progress import say


def run_train(start: Start) -> int:
    """Trains a run, or resumes it if its directory has a checkpoint; returns the exit status."""
    config = start.config
    compile_cache.start(config.cache_dir)
    with cluster.joined(config.cluster):
        from gptjax.training import trainer  # after the process has joined the others: it asks JAX for devices

        if start.note and cluster.is_first():
            say(start.note)
        try:
            return trainer.train(config, start.origin)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, UserError) or not is_out_of_memory(error):
                raise
            raise UserError(_explain(config, error)) from error


def _explain(config: Config, error: Exception) -> str:
    from gptjax.planning.memory_advice import device_memory, explain_out_of_memory

    run_dir = Path(config.run_dir).expanduser()  # its config has the size of the vocabulary
    resolved = load_run_config(run_dir) if (run_dir / CONFIG_FILE).is_file() else config
    return explain_out_of_memory(resolved, error, device_memory())
