"""The share of a deployment that is done grows with what is fetched and with what is mapped."""

from eldric.controller.pipelines import StageRecord
from eldric.controller.progress import Progress


def test_a_stage_that_is_fetched_first_is_mapped_in_its_last_tenth() -> None:
    shares: list[float] = []
    stage = StageRecord(0, "w", 1, 0, 2, weights_bytes=100, kv_bytes=0, compute_bytes=0, limit_bytes=0)
    progress = Progress([stage], lambda event: None, lambda line, share: shares.append(round(share, 3)))
    progress.report(stage, "fetching", 50, 100)
    progress.report(stage, "fetching", 100, 100)
    progress.report(stage, "mapping", 100, 200)
    progress.report(stage, "loaded", 100, 100)
    assert shares == [0.45, 0.9, 0.95, 1.0]


def test_a_stage_that_is_mapped_at_once_has_all_of_the_share() -> None:
    shares: list[float] = []
    stage = StageRecord(0, "w", 1, 0, 2, weights_bytes=100, kv_bytes=0, compute_bytes=0, limit_bytes=0)
    progress = Progress([stage], lambda event: None, lambda line, share: shares.append(share))
    progress.report(stage, "mapping", 50, 200)
    assert shares == [0.25]
