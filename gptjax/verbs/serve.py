"""`gptjax serve`."""

import signal
import socket
import sys
from pathlib import Path

from gptjax.checkpoints.run_dir import load_run
from gptjax.config.verbs.serve import ServeConfig
from gptjax.errors import UserError
from gptjax.machine import allocator, compile_cache
from gptjax.report.progress import notify


def run_serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or Ctrl-C, and finishes the requests that run then."""
    keys = read_keys(config.api_keys)
    try:
        import uvicorn

        from gptjax.serving.app import LOOPBACK, make_app
        from gptjax.serving.service import Service
    except ImportError:
        raise UserError("gptjax serve needs more packages; install them with pip install 'gptjax[serve]'") from None
    compile_cache.start()
    listening = listen(config)  # before the model is loaded, so that a port in use is told at once
    run_dir = Path(config.run_dir).expanduser()
    service = Service(  # which releases the parameters of the run
        load_run(run_dir, config.checkpoint, config.strict, notify, config.base),
        config.model_name or run_dir.resolve().name,
        config,
    )
    if config.host not in LOOPBACK and not keys:
        notify(f"host={config.host}: other machines can use the server, and no API key is asked for (--api_keys FILE)")
    if service.engine is not None:
        notify("compiling")
        service.engine.warm_up()
        allocator.release_freed_memory()  # the parameters that were converted for decoding, and what compiling used

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            host = f"[{config.host}]" if ":" in config.host else config.host
            notify(f"{service.name} is served on http://{host}:{listening.getsockname()[1]}/")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # uvicorn calls it when all is finished
    settings = uvicorn.Config(
        make_app(service, config, keys),
        log_level="warning",
        server_header=False,
        timeout_keep_alive=75,  # seconds; after uvicorn's 5 a client's pool may use a connection just as it is closed
        timeout_graceful_shutdown=int(config.max_seconds) + 1,
    )
    Server(settings).run(sockets=[listening])
    return 0


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens on the host and port of the config.

    Raises:
        UserError: It cannot.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"{config.host}:{config.port}: cannot be listened on: {error.strerror or error}") from None


def read_keys(path: str) -> list[str]:
    """The API keys of a file, one per line; without a file none.

    Raises:
        UserError: It cannot be read, or holds none.
    """
    if not path:
        return []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"api_keys={path}: cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"api_keys={path}: holds no key; write one per line")
    return keys
