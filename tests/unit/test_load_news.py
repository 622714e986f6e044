"""Progress of a load, for a caller who reads slowly: no phase is passed over, and of each only the newest counts."""

from eldric.v1 import stage_pb2
from eldric.worker.load_news import LoadNews


def event(phase: str, done_bytes: int) -> stage_pb2.LoadProgress:
    return stage_pb2.LoadProgress(phase=phase, done_bytes=done_bytes, total_bytes=1000)


async def heard(news: LoadNews) -> list[tuple[str, int]]:
    found = []
    while (each := await news.next()) is not None:
        found.append((each.phase, each.done_bytes))
    return found


async def test_a_short_phase_is_told_however_much_comes_after_it() -> None:
    news = LoadNews()
    news.tell(event("fetching", 1000))
    for done in range(100):
        news.tell(event("mapping", done))
    news.end()
    assert await heard(news) == [("fetching", 1000), ("mapping", 99)]


async def test_a_phase_that_comes_back_is_told_in_its_order() -> None:
    news = LoadNews()
    for phase in ("mapping", "fetching", "mapping"):
        news.tell(event(phase, 1))
    assert (await news.next()) == event("mapping", 1)
    news.tell(event("mapping", 2))
    news.end()
    assert await heard(news) == [("fetching", 1), ("mapping", 2)]


async def test_without_news_the_end_is_told() -> None:
    news = LoadNews()
    news.end()
    assert await heard(news) == []
