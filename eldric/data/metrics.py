"""What a data worker counts."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from eldric.data.model import StoredModel
from eldric.data.transfers import Transfers


class DataMetrics:
    """Counters and gauges of one data worker."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.served_bytes = Counter(
            "eldric_data_served_bytes", "Bytes of models that were sent, by call.", ["call"], registry=registry
        )
        self.imports = Counter(
            "eldric_data_imports", "Imports by how they ended (ok or failed).", ["outcome"], registry=registry
        )
        self.verifications = Counter(
            "eldric_data_verifications",
            "Checks of models by how they ended (sound, damaged or failed).",
            ["outcome"],
            registry=registry,
        )
        self.models = Gauge("eldric_data_models", "Models in the store.", registry=registry)
        self.unusable_models = Gauge(
            "eldric_data_unusable_models",
            "Models that cannot be deployed: damaged, or not supported.",
            registry=registry,
        )
        self.stored_bytes = Gauge("eldric_data_stored_bytes", "Bytes of all models.", registry=registry)
        self._transfers = Gauge(
            "eldric_data_transfers", "Transfers over HTTP, running or waiting.", ["state"], registry=registry
        )
        for call in ("pull", "content"):
            self.served_bytes.labels(call)
        for outcome in ("ok", "failed"):
            self.imports.labels(outcome)
        for outcome in ("sound", "damaged", "failed"):
            self.verifications.labels(outcome)

    def watch(self, transfers: Transfers) -> None:
        """Shows how many transfers run and wait, whenever somebody looks."""
        self._transfers.labels("running").set_function(lambda: transfers.running)
        self._transfers.labels("waiting").set_function(lambda: transfers.waiting)

    def saw(self, models: Iterable[StoredModel]) -> None:
        """Takes over what the store holds now."""
        models = list(models)
        self.models.set(len(models))
        self.unusable_models.set(sum(bool(model.problem) for model in models))
        self.stored_bytes.set(sum(model.size_bytes for model in models))
