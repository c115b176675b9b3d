"""The device layer on the CPU, and its GPU parts against a pretended NVML."""

import os
import platform
import resource
import types

import pytest
import torch

from harness import workers
from harness.device import allocator, execution, find, sensors
from harness.device.observe import Observer
from harness.errors import UserError

CPU = torch.device("cpu")


class Error(Exception):
    pass


class Handle:
    """A GPU at 300 W while it works; its counter runs with the clock that the test turns."""

    def __init__(self):
        self.millijoules = 0.0


def pretended_nvml(handle, mig=0, counter=True):
    def energy(_):
        if not counter:
            raise Error("not supported")
        return handle.millijoules

    def unsupported(*_):
        raise Error("not supported")

    return types.SimpleNamespace(
        NVMLError=Error, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetMigMode=lambda _: [mig, mig], nvmlDeviceGetTemperature=lambda *_: 61, nvmlDeviceGetClockInfo=lambda _, kind: 1000 * kind,
        nvmlDeviceGetPowerUsage=lambda _: 300_000, nvmlDeviceGetEnforcedPowerLimit=unsupported,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 4,
    )  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A device that says it is a GPU, with a pretended NVML: (device, handle, set up)."""
    handle, device = Handle(), types.SimpleNamespace(type="cuda")

    def set_up(**options):
        monkeypatch.setattr(sensors, "_nvml", lambda _: (pretended_nvml(handle, **options), handle))

    monkeypatch.setattr(sensors, "synchronize", lambda _: None)
    set_up()
    return device, handle, set_up


def test_energy_per_call(gpu, monkeypatch):
    device, handle, _ = gpu
    monkeypatch.setattr(sensors, "IDLE_SECONDS", 0.01)

    def call():
        handle.millijoules += 2500

    joules, calls = sensors.EnergyMeter(device).per_call(call, seconds=0.01)
    assert joules == pytest.approx(2.5)
    assert calls >= 1
    assert sensors.EnergyMeter(device).idle_watts() == 0


def test_energy_of_a_partitioned_gpu_is_refused(gpu):
    device, _, set_up = gpu
    set_up(mig=1)
    with pytest.raises(RuntimeError, match="MIG"):
        sensors.EnergyMeter(device)


def test_energy_without_a_counter_is_refused(gpu):
    device, _, set_up = gpu
    set_up(counter=False)
    with pytest.raises(RuntimeError, match="no energy counter"):
        sensors.EnergyMeter(device)


def test_energy_of_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="NVIDIA GPUs only"):
        sensors.EnergyMeter(CPU)


def test_a_gpus_state_leaves_out_what_it_does_not_tell(gpu):
    state = sensors.gpu_state(gpu[0])
    assert state == {
        "temperature_c": 61, "sm_clock_mhz": 1000, "memory_clock_mhz": 2000, "power_w": 300.0, "throttle_reasons": "0x4",
    }  # fmt: skip


def test_without_nvml_the_reason_is_recorded(monkeypatch):
    monkeypatch.setattr(sensors.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    assert "nvidia-ml-py is not installed" in sensors.gpu_state(CPU)["unknown"]


def test_the_machines_conditions_are_recorded(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.stat"
    quota.write_text("nr_periods 1\nthrottled_usec 1000000\n")
    governor = tmp_path / "governor"
    governor.write_text("performance\n")
    monkeypatch.setattr(sensors, "CGROUP", (quota,))
    monkeypatch.setattr(sensors, "GOVERNOR", governor)
    with sensors.Watch(CPU) as watch:
        quota.write_text("nr_periods 1\nthrottled_usec 3500000\n")
    assert watch.conditions["throttled_seconds"] == 2.5
    assert watch.conditions["governor"] == "performance"
    assert watch.conditions["threads"] == torch.get_num_threads()
    assert watch.conditions["allocator"] == allocator.described()
    assert "gpu" not in watch.conditions


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: bool(x.sum() > 1), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu().tolist(), 1),
        (lambda x: x.numpy(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: torch.repeat_interleave(x, torch.ones(4, dtype=torch.long), dim=0), 1),
        (lambda x: x[:, x.argsort()[0]].topk(2).indices, 0),
        (lambda x: x.to(torch.bfloat16).softmax(-1), 0),
    ],
)
def test_what_makes_the_host_wait_is_noticed(call, waits, mode):
    with mode(), Observer() as seen:
        call(torch.rand(4, 4))
    assert len(seen.waits) == waits, seen.waits


def test_operations_and_memory_of_a_call():
    x = torch.zeros(1000)
    with torch.inference_mode(), Observer() as seen:
        y = x + 1  # 4,000 bytes
        y = y.view(10, 100).t() + 1  # 4,000 more, then the first are free
        y = y * 2
    assert seen.operations == 3
    assert seen.peak == 8000
    assert execution.peak_of(CPU, lambda: (x + 1) * 2) == 8000


def test_what_a_smaller_batch_might_help():
    assert execution.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert execution.is_out_of_memory(MemoryError())
    assert execution.is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    )
    assert not execution.is_out_of_memory(RuntimeError("shape mismatch"))


def test_precision_is_restored():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with execution.precision(CPU, "float32"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:99"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=name):
        find(name)


def page_faults(keep):
    """How many pages 20 calls that need 64 MB each fault in, after two that do not count; and what the record says."""
    if keep:
        allocator.keep_memory()
    images = torch.ones(2**24)  # more than the 32 MB from which glibc always returns a block
    for call in range(22):
        if call == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        images + 1
    yield resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, allocator.described()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="another allocator")
def test_a_process_that_keeps_its_memory_does_not_fault_it_in_again():
    ((kept, how),) = workers.results_of(page_faults, True)
    ((returned, default),) = workers.results_of(page_faults, False)
    assert kept < 100 < returned
    assert (how, default) == ("kept", "default")
