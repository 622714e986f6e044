"""Edges for tests: in this process, with nodes behind them that use their addresses."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from eldric.config import NodeConfig
from eldric.edge.config import EdgeConfig
from eldric.edge.main import Edge
from eldric.security import Authority
from eldric.tunnel.limits import TunnelTimes
from tests.workers import issue

#: A tunnel that notices sooner than usual that it is broken, and whose sessions are over sooner.
QUICK = TunnelTimes(pulse_s=0.1, silence_s=0.5, gap_s=1.0, connect_s=1.0, retry_s=0.02, max_retry_s=0.1)


@contextlib.asynccontextmanager
async def edge_here(authority: Authority, folder: Path, controller: str, **settings: Any) -> AsyncIterator[Edge]:
    """An edge in this process. settings: fields of EdgeConfig."""
    home = issue(authority, folder, "edge", "e1")
    node = NodeConfig("edge", "e1", home, http_port=0, grpc_port=0, join_port=0, controllers=(controller,), drain_s=1.0)
    edge = Edge(EdgeConfig(node, **{"times": QUICK, **settings}))
    await edge.node.start()
    try:
        yield edge
    finally:
        await edge.node.stop()
