"""Whether a copy of a model may go, or is the last that a pipeline could be loaded from again."""

from eldric.controller.cluster import Cluster
from eldric.controller.deployer import Deployer
from eldric.controller.models import Models
from eldric.controller.pipelines import Phase
from eldric.errors import NotReady
from eldric.replicas import is_same


class Releases:
    def __init__(self, cluster: Cluster, models: Models, deployer: Deployer) -> None:
        self._cluster, self._models, self._deployer = cluster, models, deployer

    async def check(self, model: str, node_id: str) -> None:
        """node_id: of the data worker whose copy is to go; empty: all copies. Raises NotReady."""
        if self._deployer.is_preparing(model):
            raise NotReady(f"{model} is being deployed: wait until that is over, and undeploy it first")
        records = [each.record for each in self._cluster.deployments]
        needed = [each for each in records if each.model == model and each.phase is not Phase.UNDEPLOYING]
        left = await self._models.others(model, node_id) if needed and node_id else []
        stranded = [each.name for each in needed if not any(is_same(each.source, other.source) for other in left)]
        if stranded:
            commands = ", ".join(f"`eldric-cli undeploy {name}`" for name in stranded)
            raise NotReady(f"{model} is deployed, and could not be loaded again: {commands} first")
