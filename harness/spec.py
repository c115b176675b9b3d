"""What a benchmark spec may say. No torch here: file errors come at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from harness.errors import UserError
from harness.yamlfile import Strict, validate
from methods.core.registry import unknown

ROOT = Path(__file__).resolve().parent.parent
SPEC_FOLDER = ROOT / "benchmarks"

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


MANAGED = {  # arguments of timm's constructors that other parts of a spec decide
    "num_classes": "it comes from the data",
    "img_size": "use data.image_size (of cost: --image-size)",
    "in_chans": "images always have 3 channels",
    "drop_path_rate": "use recipe.drop_path",
}
FOREIGN = (
    "pretrained",
    "checkpoint",
    "cache_dir",
    "hf_hub",
    "local_dir",
    "custom_load",
    "state_dict",
)  # how arguments begin that load from elsewhere
FOREIGN_EXACT = {"file", "url", "pruned", "weights"}  # and others that do, by their whole name
SOURCES = (":", "/", "\\")  # in a name: timm takes it for a repository or a folder


class Data(Strict):
    """card: a name in datasets/ or the path of a card. image_size: None takes the card's. workers: processes that decode
    images that do not fit into memory. max_unreadable: so many damaged training images are replaced by others and named in
    the log; with more the run fails."""

    card: str
    image_size: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0)] = 2
    max_unreadable: Annotated[int, Field(ge=0)] = 10

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"card": value} if isinstance(value, str) else value


class Backbone(Strict):
    """A timm model and any of its constructor's arguments; classes and image size come from the data. What would load
    weights or settings from a file or from the network is refused, at any depth: ids know the arguments, not what is in
    a file. Weights come by dense.weights."""

    name: str = "deit_small_patch16_224"
    kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _elsewhere(self) -> Backbone:
        for key, place in MANAGED.items():
            if key in self.kwargs:
                raise ValueError(f"kwargs: {key} is not set here; {place}")
        if any(sign in self.name for sign in SOURCES):
            raise ValueError(
                f"name: {self.name} is a place to load from; write the name of one of timm's models (weights: "
                "use dense.weights)"
            )
        foreign = next(_foreign(self.kwargs), None)
        if foreign is not None:
            raise ValueError(
                f"kwargs: {foreign} would load something from a file or the network; use dense.weights for weights"
            )
        return self


def _foreign(value: Any) -> Iterator[str]:
    """The keys in nested dicts and lists of arguments that load from elsewhere."""
    if isinstance(value, dict):
        for key, inner in value.items():
            name = str(key).strip().lower().replace("-", "_")
            if name.startswith(FOREIGN) or name in FOREIGN_EXACT:
                yield str(key)
            yield from _foreign(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _foreign(inner)


class Dense(Strict):
    """weights: None trains the dense network with the budget; "timm" takes timm's pretrained weights; else a file."""

    weights: str | None = None


class Budget(Strict):
    """epochs: what dense training gets (or stands for, where weights are given). adapt_epochs: what every method may spend
    on top. max_steps: an upper limit for each of the two, for trying things out."""

    epochs: Positive = 300.0
    adapt_epochs: Positive = 30.0
    max_steps: PositiveInt | None = None


class Recipe(Strict):
    """How a network is trained. Names are timm's; the defaults are DeiT's, as DynamicViT uses them.

    batch_size: images per step, over all processes. optimizer: any of timm's, fused_adamw (torch's) or fused_adam (NVIDIA
        apex's); lr is absolute. Cosine from lr to min_lr after a linear warm-up over warmup_epochs.
    norm: "fused_layer_norm" trains with NVIDIA apex's kernel.
    ema: span of an exponential moving average of the weights, as a share of the phase's steps; its accuracy is an extra
        number. DeiT's decay of 0.99996 over 300 epochs spans 1/15.
    repeats: how often an epoch shows each of its images, differently augmented (DeiT: 3).
    crop: "resized" (random resized crop), "pad" (random crop after zero padding by crop_padding), or "none".
    """

    batch_size: PositiveInt = 1024
    optimizer: str = "adamw"
    lr: Positive = 1e-3
    min_lr: NonNegative = 1e-6
    warmup_epochs: NonNegative = 5.0
    weight_decay: NonNegative = 0.05
    clip_grad: Positive | None = None
    norm: Literal["layer_norm", "fused_layer_norm"] = "layer_norm"
    ema: Annotated[float, Field(gt=0, le=1)] | None = None
    repeats: PositiveInt = 1
    label_smoothing: Share = 0.1
    drop_path: Share = 0.0
    crop: Literal["resized", "pad", "none"] = "resized"
    crop_padding: Annotated[int, Field(ge=0)] = 0
    flip: Share = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: NonNegative = 0.4
    random_erasing: Share = 0.25
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mixup_prob: Share = 1.0
    mixup_switch_prob: Share = 0.5

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, and so all targets are shares of the classes: of single images, too."""
        return bool(self.mixup or self.cutmix)

    @model_validator(mode="after")
    def _picture_transforms_need_resized(self) -> Recipe:
        if self.crop != "resized" and (self.auto_augment or self.color_jitter):
            raise ValueError("auto_augment and color_jitter need crop: resized; set them to null and 0 for other crops")
        return self


class Training(Strict):
    """What training does besides learning; none of it changes what comes out, but for rounding (and but for micro_batch where
    there is drop path or dropout, whose dice are a micro-batch's).

    checkpoint_steps, checkpoint_minutes: how often the state is saved (None: not by that); keep: how many states stay.
    micro_batch: images at once per process, None: all of its share; where memory runs out it is halved.
    max_skipped: so many steps in a row may have a loss that is not a number and be skipped; with more the cell fails.
    log_steps: steps between two lines of the log; None: a thousand lines per phase. tensorboard: write its files, too.
    """

    checkpoint_steps: PositiveInt | None = None
    checkpoint_minutes: Positive | None = 10.0
    keep: PositiveInt = 2
    micro_batch: PositiveInt | None = None
    max_skipped: Annotated[int, Field(ge=0)] = 5
    log_steps: PositiveInt | None = None
    tensorboard: bool = False


class Entry(Strict):
    """A row: a method, its settings (a list that the setting itself does not take is a sweep), and the row's label, in
    which {setting} stands for that setting's value. phases: files with what a phase of that name makes (an artifact or a
    checkpoint of an earlier run, or the authors' checkpoint), to start after it. control: whether the row is there to compare
    with rather than to be judged; a control is not tested, and does not count among the rows that are."""

    method: str
    settings: dict[str, Any] = {}
    label: str | None = None
    phases: dict[str, str] = {}
    control: bool = False


MeasuredDtype = Literal["auto", "float32", "tf32", "bfloat16", "float16"]
Mode = Literal["eager", "compile", "cudagraph"]


class Conditions(Strict):
    """Under which conditions latency is measured: every batch size in every dtype and mode. dtype auto: bfloat16 on a GPU,
    float32 on the CPU."""

    batch_sizes: Annotated[list[PositiveInt], Field(min_length=1)] = [1, 32]
    dtypes: Annotated[list[MeasuredDtype], Field(min_length=1)] = ["auto"]
    modes: Annotated[list[Mode], Field(min_length=1)] = ["eager"]


class Measure(Conditions):
    """seconds: timed time per model, batch size, dtype and mode, at least. images: validation images over which data-dependent
    costs are averaged. energy: joules per image too, where the device can tell, in windows of 5 s per model."""

    seconds: Positive = 10.0
    images: PositiveInt = 8
    energy: bool = False


class Spec(Strict):
    """A benchmark. adapt: what the recipe of the adaptation changes. compile: train with torch.compile, block by block."""

    title: str = ""
    plugins: list[str] = []
    data: Data
    backbone: Backbone = Backbone()
    dense: Dense = Dense()
    budget: Budget = Budget()
    recipe: Recipe = Recipe()
    adapt: dict[str, Any] = {}
    train: Training = Training()
    distill: Literal["own", "none", "all"] = "own"
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False
    entries: list[Entry] = []
    measure: Measure = Measure()

    @model_validator(mode="after")
    def _adapt_is_a_recipe(self) -> Spec:
        wrong = next((key for key in self.adapt if key not in Recipe.model_fields), None)
        if wrong is not None:
            raise ValueError(f"adapt: {unknown('key', wrong, Recipe.model_fields)}")
        crops = {self.recipe.crop, self.adapt.get("crop", self.recipe.crop)}
        if len(crops) > 1 and "resized" in crops:
            raise ValueError("recipe and adapt must both crop resized, or neither: it decides how images are kept")
        return self

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is repeated")
        return seeds

    @property
    def adapt_recipe(self) -> Recipe:
        """The recipe of the adaptation: the dense recipe with what `adapt` changes."""
        return validate(Recipe, self.recipe.model_dump() | self.adapt, "adapt")


def is_survey(content: dict[str, Any]) -> bool:
    """Whether a file's content is a survey (latency without training) rather than a benchmark."""
    return "cases" in content


def find_spec(name: str) -> Path:
    """A spec's file from its path, or from its name in benchmarks/."""
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return path
    inside = SPEC_FOLDER / f"{name}.yaml"
    if not inside.exists():
        raise UserError(unknown("spec", name, sorted(p.stem for p in SPEC_FOLDER.glob("*.yaml"))))
    return inside
