"""Prometheus series of the endpoint; one registry per server, so that several can live in one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, ProcessCollector

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
_STEP_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_NAMESPACE = "opd_endpoint"


class Metrics:
    """Every series, with base units in its name. `model` is the served name."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=_NAMESPACE, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, namespace=_NAMESPACE, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, namespace=_NAMESPACE, registry=registry, buckets=buckets)

        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        self.requests = counter("requests", "Requests under /v1, by model and HTTP status.", "model", "code")
        self.request_seconds = histogram(
            "request_duration_seconds",
            "Generation requests, from the first byte to the answer, by HTTP status.",
            _SECONDS,
            "code",
        )
        self.queue_seconds = histogram("queue_duration_seconds", "From admission to the first step.", _SECONDS)
        self.step_seconds = histogram("step_duration_seconds", "One tick: a solver step of a batch.", _STEP_SECONDS)
        self.batch_size = histogram("batch_size", "Images that a tick advanced.", (1, 2, 4, 8, 16, 32, 64, 128))
        self.images = counter("images", "Images that were finished.")
        self.cancelled = counter("cancelled", "Requests given up unfinished: disconnect or timeout.", "reason")
        self.rejected = counter(
            "rejected", "Requests that were not admitted: queue_full, loading, draining or failed.", "reason"
        )
        self.failures = counter("failures", "Images that failed inside: encode, step, decode, internal.", "stage")
        self.queue_depth = gauge("queue_depth", "Admitted images that have not made a step.")
        self.queue_pixels = gauge("queue_pixels", "Pixels of the admitted images that have not made a step.")
        self.active_samples = gauge("active_samples", "Images between their first and their last step.")
        self.backlog = gauge("backlog_pixel_steps", "Work that is left: pixels times steps times forwards of a step.")
        self.model_info = gauge("model_info", "1 for the model in service.", "model", "version")
        self.out_of_memory = counter("out_of_memory", "Times that a batch or an image did not fit into memory.")
        self.batch_pixels = gauge("batch_pixels", "Pixels that a batch may have: less after one did not fit.")
        self.gpu_memory = gauge(
            "gpu_memory_bytes", "GPU memory: allocated by tensors, reserved by PyTorch, free; 0 on a CPU.", "kind"
        )
        for reason in ("disconnect", "timeout"):
            self.cancelled.labels(reason)
        for reason in ("queue_full", "loading", "draining", "failed"):
            self.rejected.labels(reason)
        for stage in ("encode", "step", "decode", "internal"):
            self.failures.labels(stage)
        for kind in ("allocated", "reserved", "free"):
            self.gpu_memory.labels(kind)
