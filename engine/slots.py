"""The slots of a head that are free, and which tokens' keys and values each still holds, in every stage.

A prompt that begins as a slot's last sequence did, such as the next turn of a conversation, goes on from there instead
of being computed again. Pure.
"""

import numpy as np

from eldric.engine.step import Tokens

_NOTHING: Tokens = np.empty(0, np.int32)


class FreeSlots:
    """`len` of it: how many slots are free."""

    def __init__(self, count: int) -> None:
        self._held: dict[int, Tokens] = dict.fromkeys(range(count), _NOTHING)  # the longest unused first

    def __len__(self) -> int:
        return len(self._held)

    def take(self, prompt: Tokens, unit: int) -> tuple[int, int]:
        """A slot for a prompt, and how many of the prompt's first tokens it holds: a multiple of `unit`, and never all,
        because the last one's logits are wanted.

        The slot that holds most of them is taken if that is most of what it holds. Otherwise it may be of more use to
        its own conversation, and the longest unused slot is taken.
        """
        common = {slot: _common(held, prompt) for slot, held in self._held.items()}
        slot = max(common, key=lambda each: common[each])
        if 2 * common[slot] < len(self._held[slot]):
            slot = next(iter(common))
        del self._held[slot]
        return slot, min(common[slot], len(prompt) - 1) // unit * unit

    def give_back(self, slot: int, held: Tokens) -> None:
        """held: the tokens of its sequence, from the first on, whose keys and values every stage has or will have by
        the time that the slot is taken again."""
        self._held[slot] = held

    def forget(self, slot: int) -> None:
        """Nobody knows what a slot holds, if it is free."""
        if slot in self._held:
            self._held[slot] = _NOTHING

    def forget_all(self) -> None:
        for slot in self._held:
            self._held[slot] = _NOTHING


def _common(one: Tokens, other: Tokens) -> int:
    """How many tokens they begin with alike."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
