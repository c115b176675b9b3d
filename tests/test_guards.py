"""What goes wrong in a training: it is told, counted, survived where it can be, and the run goes on afterwards."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import ROOT, bench, tiny_spec
from PIL import Image
from torch import nn

import methods
from harness import device, models, spec
from harness.data.dataset import open_data
from harness.errors import UserError
from harness.rules import RECIPE, random_data
from harness.spec import Data
from harness.training.engine import run_phases
from harness.training.journal import Journal
from harness.training.setup import Training
from harness.training.snapshots import Damaged, Snapshots, read_state, save_state
from harness.training.stepper import Diverged, NotEnoughMemory

PLAN = device.plan("cpu", "float32")


def vit(**changes):
    torch.manual_seed(0)
    sizes = {"img_size": 24, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 7}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | changes))


class Spoiled(nn.Module):
    """Classification, with something wrong at some steps. Terms: a mean over images, and one that is none."""

    def __init__(self, model, wrong=lambda images, step: None, scale=1.0):
        super().__init__()
        self.model, self.wrong, self.scale = model, wrong, scale

    def forward(self, images, targets, noise):
        logits = self.model(images).float()
        loss = nn.functional.cross_entropy(logits, targets) * self.scale
        spoiled = self.wrong(images, noise.step)
        sums = torch.cat([logits.sum(dim=0), torch.tensor([float(len(images))])])
        return {
            "classification": loss if spoiled is None else loss * spoiled,
            "spread": methods.Pooled(sums, lambda sums: (sums[:-1] / sums[-1]).pow(2).mean()),
        }


def train(objective, steps=6, data=None, plan=PLAN, **changes):
    phase = methods.TrainPhase(name="train", objective=objective, divisible=changes.pop("divisible", True))
    training = Training(
        data=data or random_data(), plan=plan, **({"recipe": RECIPE, "seed": 0, "steps": steps} | changes)
    )
    (log,), _ = run_phases(objective.model, [phase], training)
    return log


def digest(objective):
    return models.state_digest(objective.model.state_dict())


def test_steps_without_a_number_are_skipped_and_counted(tmp_path):
    before = {}

    def wrong(images, step):
        before.setdefault(step, digest(objective))
        return math.nan if step in (2, 3) else None

    objective = Spoiled(vit(), wrong)
    log = train(objective, journal=Journal(tmp_path / "log.jsonl"))
    assert (log.skipped, log.steps) == (2, 6)
    assert before[2] == before[3] == before[4] != before[5]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "skipped"] == [3, 4]
    assert log.curve[2]["classification"] == "nan"
    json.dumps(log.curve, allow_nan=False)


def test_gradients_without_a_number_are_skipped_too():
    objective = Spoiled(vit())
    objective.model.head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(Diverged, match=r"the gradient is not finite, 6 steps in a row"):
        train(objective)


@pytest.mark.parametrize(("most", "reached"), [(0, 3), (2, 5)])
def test_too_many_in_a_row_end_the_cell(most, reached):
    steps = []

    def wrong(images, step):
        steps.append(step)
        return math.nan if step >= 2 else None

    with pytest.raises(Diverged, match=rf"phase train, step {reached}: the loss is not a number"):
        train(Spoiled(vit(), wrong), options=spec.Training(max_skipped=most))
    assert max(steps) == reached - 1


def limited(most):
    """Memory for so many images."""

    def wrong(images, step):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return wrong


@pytest.mark.parametrize(("most", "micro"), [(7, 4), (3, 2), (1, 1)])
def test_out_of_memory_halves_the_micro_batch_and_changes_no_loss(most, micro):
    told = []
    whole, halved = Spoiled(vit()), Spoiled(vit(), limited(most))
    expected, log = train(whole), train(halved, say=told.append)
    assert log.micro_batch == micro
    assert "out of memory" in told[-1]
    for one, other in zip(expected.curve, log.curve, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


def test_asked_for_micro_batches_are_the_same_step():
    asked = Spoiled(vit(), limited(3))
    log = train(asked, options=spec.Training(micro_batch=3))
    assert log.micro_batch == 3
    assert log.curve[-1] == pytest.approx(train(Spoiled(vit())).curve[-1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "model", "most", "message"),
    [
        ({"divisible": False}, {}, 7, "needs them together; lower recipe.batch_size"),
        ({}, {"norm_layer": "batchnorm2d"}, 7, "needs them together"),
        ({}, {}, 0, "not even one image"),
    ],
)
def test_where_halving_does_not_help_the_cell_fails(changes, model, most, message):
    network = vit()
    if model:
        network.head_drop = nn.BatchNorm1d(24)
    with pytest.raises(NotEnoughMemory, match=message):
        train(Spoiled(network, limited(most)), **changes)


def test_a_loss_that_cannot_be_divided_refuses_to_be():
    with pytest.raises(UserError, match="needs all images of a step at once"):
        train(Spoiled(vit()), divisible=False, options=spec.Training(micro_batch=3))


def test_float16_lowers_its_scale_and_goes_on():
    objective = Spoiled(vit(), scale=100.0)
    log = train(objective, steps=12, plan=device.plan("cpu", "float16"))
    assert 0 < log.overflowed < 12
    assert log.skipped == 0
    assert math.isfinite(log.curve[-1]["classification"])
    assert log.curve[-1]["classification"] != log.curve[0]["classification"]


class Late(Spoiled):
    """Its pooled term begins at the third step."""

    def forward(self, images, targets, noise):
        terms = super().forward(images, targets, noise)
        return terms if noise.step >= 2 else {"classification": terms["classification"]}


def test_a_term_that_begins_late_is_divided_rightly_too():
    whole, divided = Late(vit()), Late(vit())
    expected, log = train(whole), train(divided, options=spec.Training(micro_batch=3))
    for one, other in zip(expected.curve, log.curve, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


# Files.


def test_a_state_is_whole_or_damaged(tmp_path):
    path = tmp_path / "a.state"
    save_state(path, {"weights": torch.arange(5.0), "step": 3})
    assert read_state(path)["weights"].tolist() == [0, 1, 2, 3, 4]
    content = path.read_bytes()
    for damaged in (content[:-1], content[:10], b"", content[:-9] + b"\0" + content[-8:], b"x" + content[1:]):
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"a\.state: not a whole file"):
            read_state(path)


def test_a_damaged_state_is_told_and_the_one_before_is_used(tmp_path):
    def stop_at(step):
        def wrong(images, number):
            if number == step:
                raise KeyboardInterrupt

        return wrong

    undisturbed = Spoiled(vit())
    train(undisturbed)
    snapshots = Snapshots(tmp_path, every_steps=1, keep=2)
    with pytest.raises(KeyboardInterrupt):
        train(Spoiled(vit(), stop_at(4)), snapshots=snapshots)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-100])
    told, objective = [], Spoiled(vit())
    log = train(objective, snapshots=snapshots, say=told.append)
    assert told == [
        f"snapshot {files[-1].name} is damaged; going on from the one before",
        "going on with phase train after step 3",
    ]
    assert digest(objective) == digest(undisturbed)
    assert (log.steps, log.images, len(log.curve)) == (6, 48, 6)


def test_a_state_of_another_model_is_refused(tmp_path):
    snapshots = Snapshots(tmp_path, every_steps=1)
    train(Spoiled(vit()), snapshots=snapshots)
    with pytest.raises(UserError, match="does not fit this model"):
        train(Spoiled(vit(embed_dim=48)), snapshots=snapshots)


def test_a_damaged_state_does_not_take_a_whole_ones_place(tmp_path):
    snapshots = Snapshots(tmp_path, every_steps=1, keep=1)
    (tmp_path / "step-000000099.state").write_bytes(b"damaged")
    assert [content for _, content in snapshots.newest()] == [None]
    snapshots.save(3, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.state"]


def test_a_state_that_could_not_be_read_again_is_told_when_it_is_saved(tmp_path):
    with pytest.raises(UserError, match="something else than tensors and plain values"):
        Snapshots(tmp_path).save(1, {"scalar": np.float64(3).reshape(1)})
    assert not list(tmp_path.iterdir())


def dice_everywhere(model, disturb=lambda: None):
    """Phases that throw dice wherever they can."""

    def change():
        with torch.no_grad():
            model.head.bias.add_(torch.rand(7))
        disturb()

    class Look(nn.Module):
        def forward(self, images, targets):
            model.head.bias.add_(torch.rand(7) * 0.1)

    objective = Spoiled(model)
    return [
        methods.TrainPhase(name="one", objective=objective, share=0.5),
        methods.CollectPhase(name="look", module=Look(), share=0.25, finish=change),
        methods.TransformPhase(name="change", apply=change),
        methods.TrainPhase(name="two", objective=objective, share=0.25),
    ]


def test_dice_of_every_phase_are_the_same_after_an_interruption(tmp_path):
    undisturbed = vit()
    run_phases(undisturbed, dice_everywhere(undisturbed), Training(RECIPE, random_data(), PLAN, 0, 8))
    interrupted, left = None, [1]

    def once():
        if left and left.pop():
            raise KeyboardInterrupt

    snapshots = Snapshots(tmp_path, every_steps=1)
    torch.manual_seed(99)
    for attempt in range(2):
        interrupted = vit()
        torch.manual_seed(attempt)
        training = Training(RECIPE, random_data(), PLAN, 0, 8, snapshots=snapshots)
        try:
            run_phases(interrupted, dice_everywhere(interrupted, once), training)
        except KeyboardInterrupt:
            assert attempt == 0
    assert models.state_digest(interrupted.state_dict()) == models.state_digest(undisturbed.state_dict())


@pytest.mark.parametrize("at", [3, 7])
def test_a_termination_is_obeyed_after_the_step_also_the_last_one(tmp_path, at):
    """SIGTERM, twice, as torchrun and schedulers send it."""

    def wrong(images, step):
        if step == at and len(images) == RECIPE.batch_size:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    snapshots = Snapshots(tmp_path, every_steps=100)
    with pytest.raises(SystemExit) as left:
        train(Spoiled(vit(), wrong), steps=8, snapshots=snapshots)
    assert left.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    undisturbed, objective = Spoiled(vit()), Spoiled(vit())
    train(undisturbed, steps=8)
    log = train(objective, steps=8, snapshots=snapshots)
    assert digest(objective) == digest(undisturbed)
    assert len(log.curve) == 8


@pytest.mark.long
def test_ctrl_c_waits_for_the_step_and_saves(tmp_path, tiny_data):
    """As a process: the same command goes on, mid-phase, and ends as an undisturbed one."""
    content = tiny_spec(tiny_data, entries=[], budget={"epochs": 60, "adapt_epochs": 1})
    (tmp_path / "slow.yaml").write_text(yaml.safe_dump(content))
    command = [
        sys.executable,
        str(ROOT / "bench.py"),
        "--spec",
        str(tmp_path / "slow.yaml"),
        "--results",
        str(tmp_path / "r"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = next(iter_until(lambda: list((tmp_path / "r").glob("logs/*.jsonl"))))
    next(iter_until(lambda: log[0].read_text().count('"step"') > 20))
    process.send_signal(2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "Traceback" not in output
    assert list((tmp_path / "r" / "checkpoints").glob("*/step-*.state"))
    again = bench("--spec", tmp_path / "slow.yaml", "--results", tmp_path / "r")
    assert again.returncode == 0, again.stdout
    assert "going on with phase train after step" in again.stdout
    steps = [json.loads(line).get("step") for line in log[0].read_text().splitlines()]
    assert [step for step in steps if step] == list(range(1, len([step for step in steps if step]) + 1))


def iter_until(condition, seconds=90):
    import time

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            yield found
        time.sleep(0.05)
    raise TimeoutError


@pytest.mark.long
def test_a_full_disk_is_told_leaves_nothing_behind_and_the_run_goes_on(tmp_path, tiny_spec_file):
    """A quota on the size of files stands for a full disk: the same error comes from the same call."""
    content = yaml.safe_load(tiny_spec_file.read_text()) | {"train": {"checkpoint_steps": 2}, "entries": []}
    (tmp_path / "full.yaml").write_text(yaml.safe_dump(content))
    arguments = f"{ROOT / 'bench.py'} --spec {tmp_path / 'full.yaml'} --results {tmp_path / 'r'}"
    full = subprocess.run(
        ["bash", "-c", f"ulimit -f 20; exec {sys.executable} {arguments}"], capture_output=True, text=True
    )
    assert full.returncode == 1
    assert "FAILED" in full.stdout
    assert "cannot be written: file too large" in full.stdout
    assert "Traceback" not in full.stdout + full.stderr
    assert not [path for path in (tmp_path / "r").rglob("*") if path.is_file() and path.suffix not in (".md", ".jsonl")]
    again = bench("--spec", tmp_path / "full.yaml", "--results", tmp_path / "r")
    assert again.returncode == 0, again.stdout


def test_a_signal_is_not_lost_where_the_phase_ends_with_an_error():
    def wrong(images, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            raise ValueError("something else")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins without
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Spoiled(vit(), wrong))
    finally:
        signal.signal(signal.SIGINT, before)


def test_micro_batches_asked_for_when_going_on_are_made(tmp_path):
    def stop(images, step):
        if step == 3:
            raise KeyboardInterrupt

    snapshots = Snapshots(tmp_path, every_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(Spoiled(vit(), stop), snapshots=snapshots)
    sizes = []
    log = train(
        Spoiled(vit(), lambda images, step: sizes.append(len(images))),
        snapshots=snapshots,
        options=spec.Training(micro_batch=3),
    )
    assert max(sizes) == 3 == log.micro_batch


# Data.


@pytest.fixture
def tree(tmp_path):
    """ImageNet's layout: 3 classes, 8 training and 2 validation pictures each, of 40 x 32 pixels."""
    dice = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for name in ("n01", "n02", "n03"):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for number in range(count):
                picture = Image.fromarray(dice.integers(0, 256, (40, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / "tree" / split / name / f"{name}_{number}.JPEG")
    card = {
        "name": "tree",
        "reader": "folder",
        "root": "tree",
        "splits": {"test": "val"},
        "image_size": 24,
        "classes": 3,
    }
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    return tmp_path / "tree"


AUGMENTED = RECIPE.model_copy(
    update={
        "crop": "resized",
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.5,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 2,
    }
)


class Soft(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets, noise):
        return {"classification": nn.functional.cross_entropy(self.model(images).float(), targets)}


def train_on(tree, workers=0, hook=None, steps=8, recipe=AUGMENTED, **changes):
    """Digest of the weights after some steps on the tree's pictures."""
    data = open_data(Data(card=str(tree.parent / "card.yaml")), tree.parent, crop="resized")
    data.workers = workers
    objective = Soft(vit(num_classes=3))
    phase = methods.TrainPhase(name="train", objective=objective, before_step=hook)
    training = Training(recipe, data, PLAN, 0, steps, **changes)
    run_phases(objective.model, [phase], training)
    return digest(objective)


def test_results_do_not_depend_on_the_number_of_workers(tree):
    (tree / "train" / "n02" / "n02_3.JPEG").write_bytes(b"\xff\xd8\xff no picture")
    told = {workers: [] for workers in (0, 2, 4)}
    digests = {train_on(tree, workers, say=told[workers].append) for workers in told}
    assert len(digests) == 1
    assert all(
        len(lines) == 1 and "n02_3.JPEG" in lines[0] and "another image is taken" in lines[0] for lines in told.values()
    )


def test_damaged_images_are_named_counted_and_too_many_are_an_error(tree, tmp_path):
    for number in range(3):
        (tree / "train" / "n01" / f"n01_{number}.JPEG").write_bytes(b"")
    recipe = AUGMENTED.model_copy(update={"repeats": 1})
    train_on(tree, recipe=recipe, max_unreadable=3, journal=Journal(tmp_path / "log.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in lines if line["event"] == "unreadable") == [0, 1, 2]
    with pytest.raises(
        UserError, match=r"3 training images cannot be read, more than data.max_unreadable \(2\): .*n01_\d.JPEG"
    ):
        train_on(tree, recipe=recipe, max_unreadable=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_goes_away_stops_the_run_which_goes_on_when_it_is_back(tree, tmp_path, workers):
    steps = 20  # more than the processes that decode have ready
    undisturbed = train_on(tree, workers, steps=steps)
    snapshots = Snapshots(tmp_path / "states", every_steps=1)

    def take_away(step, steps):
        if step == 3:
            shutil.move(tree / "train", tree / "gone")

    with pytest.raises(UserError, match=r"JPEG: no such file or directory; the data must stay where it is") as told:
        train_on(tree, workers, take_away, steps, snapshots=snapshots)
    assert "\n" not in str(told.value)
    shutil.move(tree / "gone", tree / "train")
    assert train_on(tree, workers, steps=steps, snapshots=snapshots) == undisturbed
