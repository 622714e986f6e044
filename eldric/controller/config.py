"""Settings of a controller."""

from dataclasses import dataclass

from eldric.config import NodeConfig
from eldric.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """How the controller watches over its nodes. The join port is among the node's settings."""

    node: NodeConfig
    beat_interval_ms: int = 1000  # between two beats of a node
    lease_ms: int = 3000  # a node that is silent for longer is lost
    probe_ms: int = 200  # deadline of the probe of a suspect node
    settle_ms: int = 8000  # after a start, workers of running pipelines may take so long to report
    load_idle_s: float = 120.0  # a stage whose load says nothing for so long has failed
    better_links_s: float = 10.0  # links of a ready pipeline that have not the best transport try it again, first then
    call_s: float = 15.0  # deadline of the other calls to workers and data workers
    survey_s: float = 15.0  # how often the data workers are asked what they hold, where copies are to be kept up
    replicate_after_s: float = 600.0  # a copy that is missing for so long is made anew
    copies_at_once: int = 2  # that are made at the same time

    def __post_init__(self) -> None:
        if not 10 <= self.beat_interval_ms < self.lease_ms:
            raise InvalidRequest(
                f"beat_interval_ms is {self.beat_interval_ms} and lease_ms {self.lease_ms}: "
                "the interval is at least 10 and the lease longer than it"
            )
        if (
            min(self.probe_ms, self.load_idle_s, self.call_s, self.survey_s, self.better_links_s) <= 0
            or self.settle_ms < 0
        ):
            raise InvalidRequest(
                "probe_ms, load_idle_s, call_s, survey_s and better_links_s must be positive, settle_ms not negative"
            )
        if self.replicate_after_s < 0 or self.copies_at_once < 1:
            raise InvalidRequest("replicate_after_s must not be negative, copies_at_once at least 1")
