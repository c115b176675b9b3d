"""Training data that cannot be read: damaged images are named, too many of them or a file that has gone end the cell."""

from __future__ import annotations

from collections.abc import Callable

from harness.cluster import agreed
from harness.data.readable import DataLost
from harness.errors import UserError
from harness.training.setup import Training


class Damage:
    """known: how many of the damaged images have been named already."""

    def __init__(self, training: Training) -> None:
        self.training, self.known = training, 0

    def look(self, write: Callable[..., None], lost: str = "") -> None:
        """After a batch, in all processes. write: a line of the log; lost: why this process has no batch. DataLost where any has
        none, UserError where too much is damaged."""
        training, unreadable = self.training, self.training.data.unreadable
        losses, more = training.cluster.sums([bool(lost), len(unreadable) - self.known])
        if losses:
            raise agreed(DataLost(next(filter(None, training.cluster.gather(lost)))))
        if not more:
            return
        for theirs in training.cluster.gather(dict(unreadable)):
            unreadable |= theirs
        for number, reason in list(unreadable.items())[self.known :]:
            training.say(f"{reason}; another image is taken instead")
            write("unreadable", image=number, reason=reason)
        self.known = len(unreadable)
        if self.known > training.max_unreadable:
            raise agreed(UserError(f"{self.known} training images cannot be read, more than data.max_unreadable "
                                   f"({training.max_unreadable}): {next(iter(unreadable.values()))}"))  # fmt: skip
