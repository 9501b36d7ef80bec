"""Metrics of the server for Prometheus."""

from typing import Any

from gptjax.errors import UserError

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self):
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise UserError("gptjax serve needs more packages; install them with pip install 'gptjax[serve]'") from None
        registry: Any = prometheus.CollectorRegistry()
        self._registry, self._write = registry, prometheus.generate_latest
        self._requests = prometheus.Counter(
            "gptjax_requests", "Requests by path and HTTP status", ("path", "status"), registry=registry
        )
        self._generated = prometheus.Counter("gptjax_generated_tokens", "New tokens", registry=registry)
        self._prompted = prometheus.Counter("gptjax_prompt_tokens", "Tokens of prompts", registry=registry)
        self._busy = prometheus.Gauge("gptjax_slots_busy", "Sequences that are decoded", registry=registry)
        self._waiting = prometheus.Gauge("gptjax_queue_length", "Sequences that wait for a slot", registry=registry)
        self._first = prometheus.Histogram(
            "gptjax_time_to_first_token_seconds", "From the request on", buckets=SECONDS, registry=registry
        )
        self._between = prometheus.Histogram(
            "gptjax_time_per_token_seconds", "Between new tokens of a sequence", buckets=SECONDS, registry=registry
        )
        self._seconds = prometheus.Histogram(
            "gptjax_request_seconds", "Time of a request", ("path",), buckets=SECONDS, registry=registry
        )

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has been answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def prompt(self, tokens: int) -> None:
        """Counts the tokens of a prompt."""
        self._prompted.inc(tokens)

    def tokens(self, count: int, seconds: float, first: bool) -> None:
        """Counts new tokens of a sequence, and the time since its previous tokens or, for the first, since the
        request.
        """
        self._generated.inc(count)
        if first:
            self._first.observe(seconds)
        else:
            self._between.observe(seconds / count)

    def slots(self, busy: int, waiting: int) -> None:
        """Records the number of sequences that are decoded and that wait."""
        self._busy.set(busy)
        self._waiting.set(waiting)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return self._write(self._registry)
