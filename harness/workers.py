"""Measurements in processes of their own: what a model does to memory, kernels' caches and settings stays with it, and a
process that dies takes nothing else along.

Processes are forked from a server that has imported torch and timm once, since that takes 5-7 s. The server starts from a
fresh interpreter: a process that has already computed with torch must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from typing import Any

from harness.errors import portable
from harness.spec import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "timm", "harness.measuring"])


class Died(RuntimeError):
    """A process ended before it had sent all results; killed: by a signal that the system sends when memory runs out."""

    def __init__(self, message: str, killed: bool) -> None:
        super().__init__(message, killed)
        self.killed = killed

    def __str__(self) -> str:
        return self.args[0]


def start_server() -> None:
    """Lets the server import in the background, so that the first measurement need not wait."""
    before = os.environ.get("PYTHONPATH")
    # It must import this very harness, also where another clone is the installed one; multiprocessing does not see to that.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def results_of(function: Callable[[Any], Iterator[Any]], argument: Any) -> Iterator[Any]:
    """What function(argument) yields in a process of its own, as it comes. An exception there is raised here as it was; Died
    where the process ended by itself. Function, argument and results must be picklable."""
    start_server()
    ours, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_serve, args=(function, argument, theirs))
    process.start()
    theirs.close()
    try:
        while True:
            kind, content = ours.recv()
            if kind == "end":
                return
            if kind == "error":
                raise content
            yield content
    except EOFError:
        process.join()
        raise _died(process.exitcode) from None
    finally:
        ours.close()
        if process.is_alive():
            process.terminate()
        process.join()


def _died(code: int | None) -> Died:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        killed = -code == signal.SIGKILL
        return Died(f"the process was ended by {name}{' (out of memory?)' if killed else ''}", killed)
    return Died(f"the process ended with exit code {code}", False)


def _serve(function: Callable[[Any], Iterator[Any]], argument: Any, results: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
    threading.Thread(target=_end_with_the_reader, args=(results.fileno(),), daemon=True).start()
    try:
        for result in function(argument):
            results.send(("result", result))
        results.send(("end", None))
    except BrokenPipeError:  # nobody is listening any more
        return
    except Exception as error:
        results.send(("error", portable(error)))


def _end_with_the_reader(pipe: int) -> None:
    """Ends this process when nobody can read its results any more: a killed parent must not leave it running, since it would
    disturb whatever is measured next."""
    waiting = select.poll()
    waiting.register(
        pipe, select.POLLERR
    )  # errors are all that a pipe's writing end reports when it is not asked to write
    waiting.poll()
    os._exit(1)
