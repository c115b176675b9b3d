"""Whether targets are soft is a matter of the recipe: of single images, too; and the loss takes no others."""

import math

import pytest
import torch
from torch import nn

import methods
from harness import device
from harness.cluster import Cluster
from harness.data.dataset import ImageData
from harness.data.sources import Arrays
from harness.rules.subject import CLASSES, RECIPE, SIZE, random_data
from harness.training.engine import run_phases
from harness.training.optimizers import make_criterion
from harness.training.setup import Training
from methods.core.objective import Classification

CPU = torch.device("cpu")
MIXING = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 1.0},
    "rarely": {"mixup": 0.8, "mixup_prob": 0.1},
}


def of_images(count):
    """Random data with that many training images."""
    data = random_data()
    arrays = Arrays(data.train.images[:count], data.train.labels[:count])
    ids = torch.arange(count)
    return ImageData(data.card, SIZE, CLASSES, "random", arrays, arrays, train_ids=ids, val_ids=ids[:0])


def batches(data, cluster=None, steps=3, **recipe):
    chosen = RECIPE.model_copy(update=recipe)
    return list(data.train_batches(chosen, 0, 0, steps, CPU, **({"cluster": cluster} if cluster else {})))


ALONE = {  # how an image comes to have none to be mixed with
    "batches of one": (random_data, {"batch_size": 1}, None),
    "a set of one": (lambda: of_images(1), {"batch_size": 8}, None),
    "three images, one each for two processes": (lambda: of_images(3), {"batch_size": 3}, Cluster(rank=0, size=2)),
    "copies of one image": (lambda: of_images(1), {"batch_size": 4, "repeats": 3}, None),
}


@pytest.mark.parametrize(("data", "recipe", "cluster"), ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("mixing", MIXING.values(), ids=MIXING)
def test_targets_of_single_images_are_shares(data, recipe, cluster, mixing):
    for batch in batches(data(), cluster, label_smoothing=0.1, **recipe, **mixing):
        assert batch.targets.dtype == torch.float32
        assert batch.targets.shape == (len(batch.images), CLASSES)
        torch.testing.assert_close(batch.targets.sum(dim=1), torch.ones(len(batch.images)))


def test_a_single_images_target_is_its_smoothed_label():
    data = random_data()
    for batch in batches(data, batch_size=1, mixup=0.8, label_smoothing=0.1, flip=0.0):
        expected = torch.full((1, CLASSES), 0.1 / CLASSES)
        expected[0, data.train.labels[batch.keys[0]]] += 0.9
        torch.testing.assert_close(batch.targets, expected)
        torch.testing.assert_close(batch.images, data.normalise(data.train.images[batch.keys], CPU))


def test_the_labels_number_does_not_multiply_the_loss():
    """The loss of one image, whatever its class is called: the same as of one that is mixed with its copy."""
    criterion, logits = (
        make_criterion(RECIPE.model_copy(update={"mixup": 0.8, "label_smoothing": 0.0})),
        torch.zeros(1, CLASSES),
    )
    seen = {
        batch.targets.argmax().item(): criterion(logits, batch.targets).item()
        for batch in batches(random_data(), steps=32, batch_size=1, mixup=0.8)
    }
    assert len(seen) == CLASSES
    assert all(loss == pytest.approx(math.log(CLASSES)) for loss in seen.values())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_of_more_images_nothing_changed(count):
    """timm's own mixing, of an even number."""
    for batch in batches(of_images(count), batch_size=count, mixup=0.8):
        assert len(batch.images) == count - count % 2
        assert batch.targets.shape == (len(batch.images), CLASSES)


def test_without_mixing_targets_are_labels():
    for batch in batches(random_data(), batch_size=1, label_smoothing=0.1):
        assert (batch.targets.dtype, batch.targets.shape) == (torch.int64, (1,))


def test_a_network_trains_on_single_images_with_mixing():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
    recipe = RECIPE.model_copy(update={"batch_size": 1, "mixup": 0.8})
    phase = methods.TrainPhase(name="train", objective=Classification(model, make_criterion(recipe)))
    (log,), _ = run_phases(model, [phase], Training(recipe, random_data(), device.plan("cpu", "float32"), 0, 4))
    assert log.curve[0]["classification"] < 10


SOFT, SMOOTH, PLAIN = {"mixup": 0.8}, {"label_smoothing": 0.1}, {"label_smoothing": 0.0}
WRONG = {
    "a label for shares": (SOFT, torch.tensor([3])),
    "labels for shares": (SOFT, torch.arange(4)),
    "one row for four": (SOFT, torch.rand(1, CLASSES)),
    "a column for rows": (SOFT, torch.rand(4, 1)),
    "whole shares": (SOFT, torch.ones(4, CLASSES, dtype=torch.int64)),
    "one share each": (SOFT, torch.rand(4)),
    "shares for labels": (SMOOTH, torch.rand(4, CLASSES)),
    "shares for plain labels": (PLAIN, torch.rand(4, CLASSES)),
    "float labels": (SMOOTH, torch.arange(4.0)),
    "one label for four": (SMOOTH, torch.tensor([1])),
    "a column of labels": (PLAIN, torch.arange(4)[:, None]),
    "booleans": (SMOOTH, torch.ones(4, dtype=torch.bool)),
}


@pytest.mark.parametrize(("recipe", "targets"), WRONG.values(), ids=WRONG)
def test_the_loss_refuses_targets_of_another_form(recipe, targets):
    """torch would broadcast some of these into a number."""
    logits = torch.randn(1 if targets.shape == (1,) and recipe is SOFT else 4, CLASSES)
    with pytest.raises(
        ValueError, match=r"the recipe's loss takes (shares|labels).*it was given targets torch\."
    ) as told:
        make_criterion(RECIPE.model_copy(update=recipe))(logits, targets)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("recipe", [SOFT, SMOOTH, PLAIN])
def test_the_loss_is_what_it_was(recipe):
    logits, labels = torch.randn(4, CLASSES), torch.tensor([0, 6, 3, 1])
    targets = nn.functional.one_hot(labels, CLASSES).float() if recipe is SOFT else labels
    expected = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.get("label_smoothing", 0.0))
    torch.testing.assert_close(make_criterion(RECIPE.model_copy(update=recipe))(logits, targets), expected)
