"""`gptjax plan`."""

import json

from gptjax.config.run import Config
from gptjax.config.verbs.plan import PlanConfig
from gptjax.machine import compile_cache
from gptjax.planning.describe import as_values, describe
from gptjax.planning.plan import plan_run
from gptjax.report.progress import notify


def run_plan(config: Config, options: PlanConfig) -> int:
    """Prints the memory, communication and time of a run on other devices."""
    compile_cache.start(config.cache_dir)
    compile_cache.pretend_devices(options.devices)
    given, suggested = plan_run(config, options, notify)
    print(json.dumps(as_values(given, suggested, options)) if options.json else describe(given, suggested, options))
    return 0
