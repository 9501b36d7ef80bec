"""`gptjax train`."""

from gptjax.config.run import Config
from gptjax.machine import compile_cache
from gptjax.parallel import cluster


def run_train(config: Config) -> int:
    """Trains a run, or continues it where its directory has a checkpoint; returns the exit status."""
    compile_cache.start(config.cache_dir)
    with cluster.joined(config.cluster):
        from gptjax.training import trainer  # after the process has joined the others: it asks JAX for devices

        return trainer.train(config)
