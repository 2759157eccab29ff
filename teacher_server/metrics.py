"""What a teacher counts, for Prometheus to read; docs/operations.md lists the names."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from services.contract.hosts import bind_error
from services.labels.cache import LabelCache

_PREFIX = "smoothkd_teacher"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = tuple(2**power for power in range(4, 18))


class TeacherMetrics:
    """One server's own registry; its methods may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = self._make(Counter, "calls", "Calls that have ended, by gRPC status.", "rpc", "status")
        self._call_seconds = self._make(
            Histogram, "call_seconds", "From a call's arrival to its last message.", "rpc", buckets=_SECONDS
        )
        self._under_way = self._make(Gauge, "calls_under_way", "Calls that have not ended.", "rpc")
        self._sequences = self._make(Counter, "sequences", "Sequences labelled.", "encoding", "source")
        self._tokens = self._make(Counter, "label_tokens", "Positions labelled.", "encoding", "source")
        self._batch_sequences = self._make(Histogram, "batch_sequences", "Sequences of a batch.", buckets=_SEQUENCES)
        self._batch_tokens = self._make(
            Histogram, "batch_tokens", "Tokens of a batch, padding left out.", buckets=_TOKENS
        )

    def call_began(self, rpc: str) -> None:
        self._under_way.labels(rpc).inc()

    def call_ended(self, rpc: str, *, status: str, seconds: float) -> None:
        """``status``: the name of a gRPC status code."""
        self._under_way.labels(rpc).dec()
        self._calls.labels(rpc, status).inc()
        self._call_seconds.labels(rpc).observe(seconds)

    def sequence_labelled(self, *, encoding: str, positions: int, from_cache: bool) -> None:
        source = "cache" if from_cache else "computed"
        self._sequences.labels(encoding, source).inc()
        self._tokens.labels(encoding, source).inc(positions)

    def batch_computed(self, *, sequences: int, tokens: int) -> None:
        self._batch_sequences.observe(sequences)
        self._batch_tokens.observe(tokens)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks; ``value`` is called in another thread and must not block."""
        self._make(Gauge, name, description).set_function(value)

    def watch_cache(self, cache: LabelCache) -> None:
        """Hits, misses, evictions, failures and the size of a label cache."""
        self.registry.register(_CacheCollector(cache))  # type: ignore[arg-type]

    def serve(self, host: str, port: int) -> Callable[[], None]:
        """Answer GET /metrics until the returned function is called. PortInUseError for a taken port."""
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise bind_error(error, host=host, port=port, setting="SMOOTHKD_TEACHER_METRICS_PORT") from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def _make(self, kind: Any, name: str, description: str, *labels: str, **options: Any) -> Any:
        return kind(f"{_PREFIX}_{name}", description, labels, registry=self.registry, **options)


class _CacheCollector:
    def __init__(self, cache: LabelCache) -> None:
        self._cache = cache

    def collect(self) -> Iterator[Metric]:
        stats = self._cache.stats()
        for name in ("hits", "misses", "evicted", "damaged", "failed"):
            family = CounterMetricFamily(f"{_PREFIX}_cache_{name}", _CACHE_COUNTS[name])
            family.add_metric([], getattr(stats.since_start, name))
            yield family
        yield GaugeMetricFamily(f"{_PREFIX}_cache_bytes", "Disk space of the label cache.", value=stats.bytes)
        yield GaugeMetricFamily(f"{_PREFIX}_cache_entries", "Sequences in the label cache.", value=stats.entries)


_CACHE_COUNTS = {
    "hits": "Sequences whose labels were in the cache.",
    "misses": "Sequences whose labels were not.",
    "evicted": "Entries deleted to make room.",
    "damaged": "Entries dropped because they were not whole.",
    "failed": "Labels that could not be kept.",
}
