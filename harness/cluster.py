"""The processes that train a cell together: started by torchrun, or by Slurm's srun, one per device."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from harness.errors import UserError, portable

Result = TypeVar("Result")
PATIENCE = datetime.timedelta(days=1)  # the first process measures and writes while the others wait for it
BUCKET = 64 * 2**20  # bytes of gradients that travel together
FIRST_PORT, PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Cluster:
    """This process's place among `size` processes. Every method that communicates must be called by all of them, in the same order;
    with one process they cost nothing."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that talks to people and writes files."""
        return self.rank == 0

    def part(self, ids: Tensor) -> Tensor:
        """This process's share of a step's image numbers [B]: some from the front and their mirror images from the back, because
        mixing pairs image i with image B-1-i."""
        if self.size == 1:
            return ids
        half = (len(ids) + 1) // 2
        front = torch.arange(half).tensor_split(self.size)[self.rank]
        back = len(ids) - 1 - front.flip(0)
        return ids[torch.cat([front, back[back >= half]])]

    def sums(self, values: Iterable[float]) -> list[float]:
        """Sums of numbers over all processes."""
        values = list(values)
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return self.sums([float(here)])[0] > 0

    def gather(self, content: Any) -> list[Any]:
        """Every process's content, in the order of their ranks."""
        if self.size == 1:
            return [content]
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, content)
        return found

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, as a new tensor without a gradient."""
        summed = tensor.detach().clone()
        if self.size > 1:
            distributed.all_reduce(summed)
        return summed

    def make_same(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values, in place: what each computed by itself may differ in its last bit."""
        if self.size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                distributed.broadcast(whole, 0)
                if whole is not tensor:
                    tensor.copy_(whole)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sums the gradients over all processes, some at a time so that few messages are sent. A parameter without a gradient here,
        which may have one elsewhere, counts as zero."""
        if self.size == 1:
            return
        parameters = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in parameters])
        distributed.all_reduce(has)
        used = [p for p, anywhere in zip(parameters, has.tolist(), strict=True) if anywhere]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        travelling = [self._send(bucket) for bucket in _buckets(used)]
        for bucket, flat, work in travelling:
            work.wait()
            for p, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad.copy_(summed.view_as(p))

    def _send(self, bucket: list[torch.nn.Parameter]) -> tuple[list[torch.nn.Parameter], Tensor, Any]:
        flat = torch.cat([p.grad.flatten() for p in bucket])
        return bucket, flat, distributed.all_reduce(flat, async_op=True)

    def raise_any(self, error: Exception | None) -> None:
        """Ends something that may have failed in some processes: all raise the error of the first of them; nothing happens where there
        is none."""
        if self.any(error is not None):
            raise agreed(next(found for found in self.gather(error and portable(error)) if found is not None))

    def share(self, function: Callable[[], Result]) -> Result:
        """What the first process gets from the function, which the others do not call. Its exception is raised by all."""
        if self.size == 1:
            return function()
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = function()
            except Exception as error:
                message[1] = portable(error)
        distributed.broadcast_object_list(message)
        if message[1] is not None:
            raise agreed(message[1])
        return message[0]

    def in_turn(self, function: Callable[[], Result]) -> Result:
        """Calls the function in the first process, and then in the others: what the first one downloads is there for them."""
        if self.size == 1:
            return function()
        result = function() if self.is_first else None
        self.sums([0.0])  # the others wait here
        return result if self.is_first else function()


ALONE = Cluster()


def agreed(error: Exception) -> Exception:
    """Marks an error that all processes raise at the same place, so that they may go on together."""
    error.is_agreed = True
    return error


def is_agreed(error: BaseException) -> bool:
    return getattr(error, "is_agreed", False)


def join(device: str) -> tuple[Cluster, str]:
    """Joins the processes that torchrun or srun has started, if it has: (cluster, this process's device name)."""
    _from_slurm(os.environ)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return ALONE, device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda:"):
        raise UserError(
            f"--device {device}: {size} processes need a GPU each; say cuda, and start as many as there are"
        )
    if device == "cuda":
        visible = torch.cuda.device_count()
        if visible == 1 and "SLURM_LOCALID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
            local = 0  # Slurm may show every task its own GPU alone
        if local >= visible:
            raise UserError(f"process {local} of this machine has no GPU of its own: it has {visible}; start as many")
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    # Numbers and objects on the host travel by gloo, gradients on GPUs by NCCL.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device != "cpu" else "gloo", timeout=PATIENCE)
    return Cluster(distributed.get_rank(), size), device


def leave() -> None:
    """Ends the communication, if there was any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _from_slurm(environment: MutableMapping[str, str]) -> None:
    """Slurm's variables as torchrun's, for a step of several tasks (srun). A batch script that starts one process by itself
    has no such step."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment.setdefault("MASTER_ADDR", _first_host(environment.get("SLURM_STEP_NODELIST", "localhost")))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % PORTS))


def _first_host(nodes: str) -> str:
    """The first of Slurm's node list: node7, node[01-04,9]-x, a1,a2."""
    match = re.match(r"([^,\[]*)(?:\[([^\]]*)\]([^,]*))?", nodes)
    head, inside, tail = match.groups()
    return head if inside is None else head + re.split("[,-]", inside)[0] + (tail or "")


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in groups of about BUCKET bytes of gradients, one dtype each."""
    buckets: list[list[torch.nn.Parameter]] = []
    filled = BUCKET
    for p in parameters:
        if filled >= BUCKET or buckets[-1][-1].grad.dtype != p.grad.dtype:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += p.grad.nbytes
    return buckets
