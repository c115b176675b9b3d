"""Files and folders that systems and editors leave behind: one rule for whatever is listed. No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import PurePath

SYSTEM = {  # what is not hidden by a dot, in lower case: macOS, Windows, Linux, network storage, Python
    "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    "lost+found", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__pycache__",
}  # fmt: skip
SHOWN = 3  # names in a line about what is left out


def hidden_part(path: PurePath | str) -> str | None:
    """The path up to its first hidden part: a name that begins with a dot (as .ipynb_checkpoints, .DS_Store and
    ._cat.jpg do), or one of SYSTEM. None where all of it is visible. The path is relative: where a data set lies is
    nobody's business."""
    parts = str(path).replace(os.sep, "/").split("/")
    for place, part in enumerate(parts):
        if (part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM:
            return "/".join(parts[: place + 1]).removeprefix("./")
    return None


def left_out(names: Iterable[str]) -> str | None:
    """A line that says how many hidden files and folders were left out, and which; None for none."""
    names = sorted(set(names))
    if not names:
        return None
    more = ", ..." if len(names) > SHOWN else ""
    what = "hidden or system file or folder is" if len(names) == 1 else "hidden or system files and folders are"
    return f"{len(names)} {what} left out: {', '.join(names[:SHOWN])}{more}"
