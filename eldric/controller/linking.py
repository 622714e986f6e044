"""How a ring gets its links: what each stage is asked, and what its answers lead to. Pure; `ring` makes the calls."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from eldric.controller import convert
from eldric.controller.links import LinkChoice
from eldric.controller.nodes import Endpoint, StageKey, StageReport
from eldric.controller.pipelines import StageRecord
from eldric.errors import EldricError, Unavailable
from eldric.v1 import common_pb2, stage_pb2

log = logging.getLogger(__name__)

#: How long a stage tries to reach the next one by a transport that has an alternative. The neighbours are told at the
#: same time, so it takes no longer than they need to hear of it.
TRY_MS = 3000


@dataclass(frozen=True, slots=True)
class Wired:
    """Where a stage listens, and who it is to the next one."""

    endpoint: Endpoint
    sender_scheme: str
    sender_key: str


def wired(report: StageReport) -> Wired | None:
    """What a stage has; None when it does not listen. Until it is told, it sends with what it receives by."""
    endpoint = report.endpoint
    if endpoint is None:
        return None
    if not report.sender_scheme:
        return Wired(endpoint, endpoint.scheme, endpoint.public_key)
    return Wired(endpoint, report.sender_scheme, report.sender_key)


@dataclass(frozen=True, slots=True)
class Linking:
    """A ring whose stages are there and whose links are being made. A ring of one stage has none."""

    pipeline_id: str
    epoch: int
    stages: tuple[StageRecord, ...]
    wired: tuple[Wired, ...]  # of each stage
    choices: tuple[LinkChoice, ...]  # of the link from each stage to the next
    round: int = 0  # how often the stages were connected before
    used: tuple[Wired, ...] = ()  # what the stages go on with, where links are made beside those; empty: they are not

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(choice.scheme for choice in self.choices)

    def beside(self, choices: tuple[LinkChoice, ...]) -> "Linking":
        """Other links beside these, for the next round."""
        return replace(self, choices=choices, used=self.wired)

    def explained(self, before: "Linking") -> "Linking":
        """With the reasons of `before` for links that are as they were, and were not tried again."""
        choices = zip(self.choices, before.choices, strict=True)
        kept = [old if new.scheme == old.scheme and not new.fallback else new for new, old in choices]
        return replace(self, choices=tuple(kept))

    def key(self, stage: StageRecord) -> StageKey:
        return StageKey(self.pipeline_id, self.epoch, stage.index)

    def open_requests(self) -> dict[int, stage_pb2.OpenLinksRequest]:
        """What the stages are asked that do not receive or send by their links' schemes, by index."""
        requests = {}
        for stage, have in zip(self.stages, self.wired, strict=True) if self.choices else ():
            receive, send = self.choices[stage.index - 1].scheme, self.choices[stage.index].scheme
            if (have.endpoint.scheme, have.sender_scheme) != (receive, send):
                requests[stage.index] = stage_pb2.OpenLinksRequest(
                    pipeline_id=self.pipeline_id,
                    index=stage.index,
                    epoch=self.epoch,
                    receive=receive,
                    send=send,
                    beside=bool(self.used),
                )
        return requests

    def opened(self, answers: Mapping[int, stage_pb2.OpenLinksResponse]) -> tuple["Linking", dict[int, str]]:
        """The ring after these answers, by stage, and the links that could not be opened: by sending stage, and why."""
        have, failed = list(self.wired), dict[int, str]()
        for index, answer in answers.items():
            have[index] = Wired(_endpoint(answer.endpoint), answer.sender_scheme, answer.sender_key)
            before = (index - 1) % len(self.stages)
            for link, problem in ((index, answer.send_problem), (before, answer.receive_problem)):
                if problem:
                    failed.setdefault(link, f"{self.stages[index].worker}: {problem}")
        return replace(self, wired=tuple(have)), failed

    def drop_request(self, stage: StageRecord) -> stage_pb2.OpenLinksRequest:
        """Close what is beside the links in use."""
        return stage_pb2.OpenLinksRequest(
            pipeline_id=self.pipeline_id, index=stage.index, epoch=self.epoch, beside=True
        )

    def connect_request(
        self, stage: StageRecord, phase: "stage_pb2.ConnectPhase.ValueType" = stage_pb2.NOW
    ) -> stage_pb2.ConnectRequest:
        """What a stage is told of its neighbours; the ring closes from the tail to the head."""
        request = stage_pb2.ConnectRequest(
            pipeline_id=self.pipeline_id,
            index=stage.index,
            epoch=self.epoch,
            workers=[each.worker for each in self.stages],
            round=self.round,
            phase=phase,
        )
        if self.choices:
            choice, after = self.choices[stage.index], (stage.index + 1) % len(self.stages)
            request.next.CopyFrom(convert.endpoint_message(self.wired[after].endpoint))
            request.next_index, request.fallback = after, choice.fallback
            request.try_ms = TRY_MS if choice.others or phase == stage_pb2.BESIDE else 0
            before = [ends[stage.index - 1] for ends in (self.wired, self.used) if ends]
            keys = dict.fromkeys(end.sender_key for end in before[: 2 if phase == stage_pb2.BESIDE else 1])
            request.allowed_keys.extend(key for key in keys if key)
        return request

    def fell_back(self, failed: Mapping[int, str]) -> "Linking":
        """The ring after these links failed, by sending stage. Raises Unavailable when one cannot fall back."""
        choices = list(self.choices)
        for index, problem in failed.items():
            stage, before = self.stages[index], self.choices[index].scheme
            try:
                choices[index] = self.choices[index].failed(problem)
            except Unavailable as error:
                raise named(stage, error) from None
            after = choices[index].scheme
            log.log(
                logging.INFO if self.used else logging.WARNING,
                "event=link_fell_back pipeline=%s stage=%d worker=%s from=%s to=%s reason=%r",
                *(self.pipeline_id, index, stage.worker, before, after, problem),
            )
        return replace(self, choices=tuple(choices))

    def next_round(self) -> "Linking":
        return replace(self, round=self.round + 1)


def named(stage: StageRecord, error: EldricError) -> EldricError:
    """The error, with whose it is."""
    return type(error)(f"stage {stage.index} on {stage.worker}: {error.message}")


def _endpoint(message: common_pb2.TensorEndpoint) -> Endpoint:
    return Endpoint(message.scheme, message.address, message.public_key)
