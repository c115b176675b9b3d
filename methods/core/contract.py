"""The contract between a method and the harness. Importing this needs no torch, so listing methods stays quick."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pydantic

if TYPE_CHECKING:
    from timm.models import VisionTransformer
    from torch import Tensor, nn

    from methods.core.report import Report


class Unsupported(ValueError):
    """A method cannot work on this backbone; the message is the reason, for people."""


class Settings(pydantic.BaseModel):
    """A method's settings. Defaults are the paper's; names are the authors'. Unknown keys are errors."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate.

    lr_scale multiplies the phase's learning rate; frozen is the share of the phase's steps, from its start, in which
    the rate is 0 (the optimizer's moments accumulate all the same, as with the papers' own lr = 0).
    """

    name: str
    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    frozen: float = 0.0


@dataclass(kw_only=True)
class TrainPhase:
    """A stage of gradient training.

    objective: a module that holds the sparse model (and the frozen teacher) and maps (images [B, 3, H, W], targets [B]
        or [B, classes], noise) to named loss terms, weighted so that their sum is the loss. A term is a tensor, the mean
        over these images, or a `Pooled` (see `methods.core.pooled`): a step's images may come in several micro-batches
        and be shared out among processes. All randomness comes from `noise` (see `methods.core.noise`) or from torch's
        global generator, which the harness seeds at every step. A forward changes no state; the hooks do.
    share: part of the method's budget that the phase may spend; the shares of all phases sum to 1.
    groups: what is trained and how fast; None: every parameter that requires a gradient, at scale 1. A parameter in no
        group is never updated.
    before_step, after_step: called with (step, steps), steps counted in this phase from 0. After the step the gradients
        of the groups' parameters are still there, the same on all processes. A step whose loss or gradient was not finite
        (or beyond float16's range) changes nothing, and after_step is not called. What after_step returns, a dict of plain values
        or None, goes to the log and, as an event of the phase, into the record: for what happens now and then.
    state: anything with state_dict / load_state_dict that must survive an interruption besides the objective.
    divisible: False where a loss needs all images of a step at once and no `Pooled` can express it: then a lack of memory
        is an error instead of a reason for smaller micro-batches, and several processes are refused.
    artifact: a key under which other cells may reuse what this phase made (they are still charged its cost). It names
        every setting that matters for it; data, backbone, recipe, budget, seed and dense weights are added by the harness.
        All phases before it need one, too.
    makes: the model's modules that the phase makes, where it leaves the others alone: of a file that is given for the phase these are taken, and no more.
    """

    name: str
    objective: nn.Module
    share: float = 1.0
    groups: Sequence[Group] | None = None
    before_step: Callable[[int, int], None] | None = None
    after_step: Callable[[int, int], dict[str, Any] | None] | None = None
    state: Any = None
    divisible: bool = True
    artifact: str | None = None
    makes: Sequence[str] | None = None
    kind: ClassVar[str] = "train"


@dataclass(kw_only=True)
class CollectPhase:
    """A pass over training images without gradients that gathers statistics.

    module: maps (images [B, 3, H, W], targets [B]) to anything; what it gathers it keeps in its buffers, so that it
        survives an interruption (or in `state`). The images are the training set's, not augmented, in order. finish is
        called once at the end. share as in TrainPhase: the number of images is that share of the budget, at least a
        batch and at most one pass over the data. state and artifact as in TrainPhase.
    augmented: whether the images are those of a training step at that place of the budget instead, augmented by the recipe but not mixed.
    divided: whether several processes share the images out; `finish` must then add up what they gathered, with
        `methods.core.pooled.total`. Otherwise every process sees all of them.
    """

    name: str
    module: nn.Module
    finish: Callable[[], None] | None = None
    share: float = 0.0
    divided: bool = False
    augmented: bool = False
    state: Any = None
    artifact: str | None = None
    kind: ClassVar[str] = "collect"


@dataclass(kw_only=True)
class TransformPhase:
    """A change of the model in place, without data (shapes of parameters and buffers stay). What it decides it writes into
    buffers or `state`: a run that goes on after it does not apply it again."""

    name: str
    apply: Callable[[], None]
    share: float = 0.0
    state: Any = None
    artifact: str | None = None
    kind: ClassVar[str] = "transform"


Phase = TrainPhase | CollectPhase | TransformPhase


class Method:
    """A way to make a vision transformer sparse. Subclass it, name it, register it with `methods.register`.

    name: how it is called in specs and on the command line; the first line of the docstring says what it is.
    revision: raised whenever a change of the code changes results, so that old records are told from new ones.
    start: "dense" (begins with the trained dense weights) or "scratch" (random weights, and the dense budget on top).
    uses_teacher: whether its own losses want the trained dense network.
    work_varies: whether images may differ in what they cost, or in what else `report` says of each. True is always safe; False spares the evaluation a report of
        every batch.
    keeps_as_told: whether `calibrate`, where a method has its own, goes by keep_rate: then rows of untrained models say which it was.
    """

    name: ClassVar[str]
    revision: ClassVar[int] = 1
    uses_teacher: ClassVar[bool] = False
    work_varies: ClassVar[bool] = True
    keeps_as_told: ClassVar[bool] = True
    Settings: ClassVar[type[Settings]] = Settings
    start: Literal["dense", "scratch"] = "dense"

    def __init__(self, **settings: Any) -> None:
        self.settings = self.Settings(**settings)

    def sparsify(self, vit: VisionTransformer) -> nn.Module:
        """The form that trains. `vit` is left as it is; timm's parameter names are kept, and all buffers have their
        final shapes. In eval mode maps images [B, 3, H, W] to logits [B, classes]. Raises Unsupported."""
        raise NotImplementedError(f"{type(self).__name__} must define sparsify")

    def deploy(self, sparse: nn.Module) -> nn.Module:
        """The form that ships, in eval mode: the same logits as `sparse.eval()` to float rounding, and the pruned work
        really skipped. `sparse` is left as it is."""
        import copy

        return copy.deepcopy(sparse).eval().requires_grad_(False)

    def report(self, module: nn.Module, images: Tensor) -> Report:
        """What `module` (sparse or deployed) keeps of these images in eval mode; here: everything."""
        from methods.core.vit import dense_report

        return dense_report(module)

    @contextlib.contextmanager
    def reporting(self, module: nn.Module) -> Iterator[Callable[[Tensor], Report]]:
        """While it is open: a function that says what `report` says of images [B, 3, H, W] that `module` has just been called with, all of them and no others.
        Here it calls `report`; a method whose report runs the model, and whose work varies, makes it of what the call has computed (see
        `methods.core.watching`), so that evaluation takes one forward."""
        yield partial(self.report, module)

    def calibrate(self, sparse: nn.Module, images: Tensor, keep_rate: float) -> None:
        """For timing without training: sets what decides in the untrained `sparse` (thresholds, biases) so that about
        `keep_rate` of what could be kept of `images` [B, 3, H, W] is kept, averaged over blocks. Here: nothing, for
        methods whose settings fix that."""

    def phases(self, sparse: nn.Module, criterion: nn.Module, teacher: nn.Module | None = None) -> Sequence[Phase]:
        """How it trains. `criterion` maps (logits, targets) to the classification loss; `teacher` is the trained dense
        network, or None where there is no teacher to be used. Here: all parameters, classification loss, and the
        logits of the teacher if there is one."""
        from methods.core.objective import Classification

        return [TrainPhase(name="train", objective=Classification(sparse, criterion, teacher))]

    def convert_checkpoint(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' released checkpoint as a state dict that `sparse` loads."""
        return state_dict.get("model", state_dict)
