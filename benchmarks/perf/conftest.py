"""What every piece is timed with: the device, the threads, the dtypes, the seed, and a clock that waits for the device.

One thread by default: while another process took one of two cores, pieces of 20 us to 20 ms were 10 to 600 times slower on
two threads (every parallel region seems to wait for the core that is away), and most changed by less than 10 % on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from harness import device as devices
from harness.device.execution import synchronize

WARM_UP = 5  # calls before the clock runs: the first ones allocate memory and choose kernels


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="auto", help="where tensors live: auto, cpu, cuda or cuda:N")
    parser.addoption("--threads", type=int, default=1, help="torch's threads; more than 1 only on an idle machine")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The device with its threads and the dtypes (float32, and what the device trains in) are parameters: they become part
    of a benchmark's name, so that runs on different devices or threads are never compared."""
    plan = devices.plan(metafunc.config.getoption("--device"), "auto")
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(
            "device", [str(plan.device)], ids=[f"{plan.device}-{torch.get_num_threads()}t"], indirect=True
        )
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", list(dict.fromkeys(["float32", plan.dtype])), indirect=True)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Saves the device, its driver, the threads and the packages with a run; comparing with another set-up then warns."""
    where = devices.where(devices.plan(config.getoption("--device"), "auto").device)
    machine_info["torch"] = {key: value for key, value in where.items() if key != "load"}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return devices.DTYPES[request.param]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def inference() -> Iterator[None]:
    """No gradients, as in evaluation."""
    with torch.inference_mode():
        yield


@pytest.fixture
def timed(benchmark, device: torch.device) -> Callable[..., Any]:
    """timed(group, function, *arguments): the function's result, its time taken until the device is done. What is in the
    same group stands in one table."""

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        result = function(*arguments)
        synchronize(device)
        return result

    def run(group: str, function: Callable[..., Any], *arguments: Any) -> Any:
        benchmark.group = group
        for _ in range(WARM_UP if benchmark.enabled else 0):
            call(function, *arguments)
        return benchmark(call, function, *arguments)

    return run
