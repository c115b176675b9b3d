"""What people see while they wait."""

import io

from rich.console import Console

from harness.progress import Reporter
from harness.training.setup import Progress


def told(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
    with Reporter(console) as reporter:
        reporter.begin("[1/2] dense", "training")
        for step in range(1, 4):
            reporter.watch(Progress("train", step, 3, 0.5, 1234.5))
            if reporter.bars:
                reporter.bars.refresh()
        reporter.watch(Progress("collect", 1, 2, None, None))
        reporter.begin("[1/2] dense", "measuring")
        if reporter.bars:
            reporter.bars.refresh()
        reporter.done("[1/2] dense: done [not markup]")
    return console.file.getvalue()


def test_a_terminal_gets_bars():
    text = told(terminal=True)
    assert "loss 0.500, 1,234 images/s" in text
    assert "3/3" in text
    assert "[1/2] dense: done [not markup]" in text


def test_elsewhere_there_are_plain_lines():
    text = told(terminal=False)
    assert text.splitlines() == ["[1/2] dense: training", "[1/2] dense: measuring", "[1/2] dense: done [not markup]"]
    assert "\x1b" not in text
