"""What `/metrics` says, under vLLM's names where it has one, so that its dashboards work."""

import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from finetune.serving.http import P
from finetune.serving.requests import Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of this server alone."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(self)  # a collector by its method
        ProcessCollector(registry=self._registry)  # memory, processor time, open files
        self.first_token = Histogram(
            "vllm:time_to_first_token_seconds",
            "From a request to the first piece of its reply",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.latency = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a request to the end of its reply",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.finished = Counter(
            "vllm:request_success", "Replies that ended, by why", ["finished_reason"], registry=self._registry
        )
        self.refused = Counter(
            "finetune:requests_refused", "Requests refused, by status", ["status"], registry=self._registry
        )

    def collect(self) -> Iterator[Metric]:
        """Numbers of the engine at this moment."""
        now = self._stats()
        yield GaugeMetricFamily("vllm:num_requests_running", "Replies that are being written", now.running)
        yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for a place", now.waiting)
        yield CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts that were read", now.prompt_tokens)
        yield CounterMetricFamily("vllm:generation_tokens", "Tokens that were written", now.written_tokens)

    def page(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)

    async def timed(self, pieces: AsyncIterable[P]) -> AsyncIterator[P]:
        """The same pieces of an answer, with their times noted."""
        began, first = time.monotonic(), True
        async for piece in pieces:
            now = time.monotonic() - began
            if first:
                self.first_token.observe(now)
                first = False
            if piece.finish:
                self.latency.observe(now)
                self.finished.labels(piece.finish.value).inc()
            yield piece
