"""`gptjax train`."""

from gptjax.config.start import Start
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
        return trainer.train(config)
