"""Tells people how a run is going: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from harness.training.setup import Progress

PLAIN_SECONDS = 15.0  # between two lines about the same phase where there is no terminal


class Reporter:
    """Use as a context manager around a run. quiet: says nothing, as all processes but the first."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=quiet)
        self.bars: Bars | None = None
        self._task: TaskID | None = None
        self._cell = ""
        self._told = 0.0

    def __enter__(self) -> Reporter:
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[info]}"))  # fmt: skip
            self.bars = Bars(*columns, console=self.console, transient=True)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def begin(self, cell: str, what: str) -> None:
        """Another cell, or another thing done to it."""
        self._cell = cell
        self._drop()
        self._told = time.monotonic()
        if self.bars is None:
            self.say(f"{cell}: {what}")
        else:
            self._task = self.bars.add_task(f"{cell}: {what}", total=None, info="")

    def watch(self, progress: Progress) -> None:
        """A training step."""
        info = []
        if progress.loss is not None:
            info.append(f"loss {progress.loss:.3f}")
        if progress.images_per_second:
            info.append(f"{progress.images_per_second:,.0f} images/s")
        if self.bars is not None and self._task is not None:
            self.bars.update(
                self._task, description=f"{self._cell}: {progress.phase}", completed=progress.step, total=progress.steps,
                info=", ".join(info),
            )  # fmt: skip
        elif self.bars is None and time.monotonic() - self._told > PLAIN_SECONDS:
            self._told = time.monotonic()
            self.say(f"{self._cell}: {progress.phase} {progress.step}/{progress.steps} {', '.join(info)}")

    def done(self, text: str) -> None:
        """The current cell's last line."""
        self._drop()
        self.say(text)

    def _drop(self) -> None:
        if self.bars is not None and self._task is not None:
            self.bars.remove_task(self._task)
            self._task = None
