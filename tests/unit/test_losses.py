"""Which lost peers are reported, and in which epoch."""

from dataclasses import dataclass

from eldric.transport.errors import PeerLost
from eldric.transport.losses import Losses


@dataclass
class End:
    epoch: int


def lost(stage: int) -> PeerLost:
    return PeerLost(stage, "gone", inbound=True)


def taken(losses: Losses) -> list[int]:
    stages = []
    while (loss := losses.take()) is not None:
        stages.append(loss.stage)
    return stages


def test_losses_of_this_epoch_are_taken_once_and_in_order() -> None:
    losses = Losses()
    losses.set_epoch(3)
    for stage, epoch in ((1, 3), (2, 2), (3, 3)):
        losses.add(lost(stage), End(epoch))
    assert losses
    assert taken(losses) == [1, 3]
    assert not losses


def test_loss_in_a_later_epoch_waits_for_it() -> None:
    losses = Losses()
    losses.add(lost(1), End(2))
    losses.add(lost(2), End(3))
    losses.set_epoch(1)
    assert taken(losses) == [] and not losses
    losses.set_epoch(2)
    assert losses and taken(losses) == [1]
    losses.set_epoch(3)
    assert taken(losses) == [2]


def test_link_confirmed_after_its_end_was_noticed_counts_in_the_new_epoch() -> None:
    losses, end = Losses(), End(1)
    losses.add(lost(1), end)
    losses.set_epoch(2)
    end.epoch = 2
    assert taken(losses) == [1]
