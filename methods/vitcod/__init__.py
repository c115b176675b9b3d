"""ViTCoD: low-rank heads and fixed sparse attention masks (You et al., HPCA 2023, arXiv 2210.09573)."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

import methods
from methods.core.vit import dense_report, require_plain_vit
from methods.vitcod import masks
from methods.vitcod.autoencoder import hidden_heads
from methods.vitcod.checkpoint import converted
from methods.vitcod.deployed import deploy_attention
from methods.vitcod.model import CODED, DECIDED, EVERYTHING, MADE_UP, CodedAttention, ViTCoDViT, make_coded
from methods.vitcod.reorder import reorder
from methods.vitcod.simulator import MEGAHERTZ, simulate
from methods.vitcod.statistics import AverageAttention, HeadStatistics
from methods.vitcod.training import CodedObjective

ESTIMATE = "by the authors' simplified model at 500 MHz, in which the first head's mask stands for all where a column does not say otherwise; no stem, classifier, softmax or norm; small networks wait for loads, whatever the mask"
Share = Annotated[float, Field(gt=0, lt=1)]


class Settings(methods.Settings):
    """svd_type: what the auto-encoder over heads codes: queries and keys (mix_head_fc_qk, the paper's), one of them, or none.
    svd_init: "pca" sets it to the principal components over heads before training (ours, for short budgets); "official" draws truncated normals,
        which destroy the pretrained attention at the start.
    reconstruction: weight of its loss, for the authors' 64 images.
    method: how averaged attention becomes masks: info (the paper's), ratio, std or random.
    sparsity: the share of attention entries to be pruned, CLS's row and column included, for info (whose cut is found by bisection), ratio and random.
        info_cut: the attention mass that rows keep, instead (not the sparsity!). std_factor: for std.
    mask_path: masks from the authors' .npy file (True: pruned) instead; average_path: averaged attention from theirs. Then no attention is averaged.
        mask_sha256, average_sha256 are filled in: a file that changed is another setting.
    average_augmented: whether attention is averaged over augmented images, as in the official code.
    lowrank_share, finetune_share: of the budget, for the trainings before and after the masks (100 epochs each in the paper); basis_share,
        average_share: for the images that principal components and averages are taken of. They are relative to the sum of those of the phases
        that take place. finetune_lr: rate of the last training, relative to the first one's (1e-5 and 1e-4 in the paper).
    """

    svd_type: Literal["mix_head_fc_qk", "mix_head_fc_q", "mix_head_fc_k", "none"] = "mix_head_fc_qk"
    svd_init: Literal["pca", "official"] = "pca"
    reconstruction: Annotated[float, Field(ge=0)] = 1e-4
    method: Literal["info", "ratio", "std", "random"] = "info"
    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    info_cut: Annotated[float, Field(ge=0, le=1)] | None = None
    std_factor: float = 1.0
    mask_path: str | None = None
    mask_sha256: str | None = None
    average_path: str | None = None
    average_sha256: str | None = None
    lowrank_share: Share = 0.48
    finetune_share: Share = 0.48
    basis_share: Share = 0.01
    average_share: Share = 0.03
    average_augmented: bool = False
    finetune_lr: Annotated[float, Field(gt=0)] = 0.1

    @pydantic.model_validator(mode="after")
    def _fit_together(self) -> Settings:
        for kind in ("mask", "average"):
            self._know_file(kind)
        if self.mask_path is not None and self.average_path is not None:
            raise ValueError("mask_path and average_path: masks that are given need no averaged attention")
        if self.info_cut is not None and self.method != "info":
            raise ValueError(f"info_cut is for method: info, not {self.method}")
        return self

    def _know_file(self, kind: str) -> None:
        path, known = getattr(self, f"{kind}_path"), getattr(self, f"{kind}_sha256")
        if path is None:
            if known is not None:
                raise ValueError(f"{kind}_sha256 goes with {kind}_path")
            return
        try:
            found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise ValueError(f"{kind}_path {path}: {(error.strerror or str(error)).lower()}") from None
        if known not in (None, found):
            raise ValueError(f"{kind}_path {path}: the file is not the one that {kind}_sha256 was taken of")
        object.__setattr__(self, f"{kind}_sha256", found)

    @pydantic.model_serializer(mode="wrap")
    def _written(self, write: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """average_augmented came after the first records: where it changes nothing it is left out, so that those stay what they are."""
        found = write(self)
        return (
            found
            if self.average_augmented
            else {name: value for name, value in found.items() if name != "average_augmented"}
        )

    @property
    def aims_at_sparsity(self) -> bool:
        """Whether `sparsity` decides how much is pruned, and not a cut, a factor or a file."""
        return self.info_cut is None and self.method != "std" and self.mask_path is None

    @property
    def averages(self) -> bool:
        """Whether masks are made from attention that the training set is averaged over for."""
        return self.mask_path is None and self.average_path is None and self.method != "random"


@methods.register
class ViTCoD(methods.Method):
    """ViTCoD: low-rank heads and fixed sparse attention masks (You et al., HPCA 2023, arXiv 2210.09573).

    Phases: `basis` (principal components over heads), `lowrank` (training with the auto-encoder and its reconstruction loss), `average` (attention maps
    over training images), `mask`, and `finetune` (training under the masks). Each can be given as a file instead. Without an auto-encoder the first
    two fall away (the official code cannot train then).

    The paper's speed is that of an accelerator. Here the auto-encoder, which is affine over heads, is folded into the projections, and attention computes
    what the mask keeps where a measurement finds that faster than computing all of it under the mask.
    """

    name = "vitcod"
    keeps_as_told = False
    work_varies = False
    Settings = Settings

    def sparsify(self, vit: nn.Module) -> ViTCoDViT:
        require_plain_vit(vit, self.name)
        for index, block in enumerate(vit.blocks):
            if self.settings.svd_type != "none" and not isinstance(block.attn.q_norm, nn.Identity):
                raise methods.Unsupported(f"vitcod: block {index} normalises queries and keys; the auto-encoder then does not fold into qkv "
                                          "(svd_type: none works)")  # fmt: skip
        sparse = make_coded(vit, self.settings.svd_type)
        self._check_possible(sparse)
        return sparse

    def _check_possible(self, sparse: ViTCoDViT) -> None:
        """A wrong file, or masks that cannot be, are told before anything is trained."""
        settings, tokens, prefix = self.settings, sparse.tokens, sparse.num_prefix_tokens
        self._given(sparse)
        patches = tokens - prefix
        most = patches * (patches - 1) / tokens**2  # every row keeps an entry besides the prefix
        if settings.aims_at_sparsity and settings.method != "random" and settings.sparsity > most:
            raise methods.Unsupported(f"vitcod: sparsity {settings.sparsity}: with {tokens} tokens, of which {prefix} are protected, at most "
                                      f"{most:.4f} can be pruned")  # fmt: skip

    def _given(self, sparse: ViTCoDViT) -> Tensor | None:
        """What mask_path or average_path holds, [L, H, N, N]. Unsupported where it does not fit."""
        shape = (len(sparse.blocks), *sparse.attentions[0].kept.shape)
        try:
            if self.settings.mask_path is not None:
                return masks.read_masks(Path(self.settings.mask_path), shape)
            if self.settings.average_path is not None:
                return masks.read_average(Path(self.settings.average_path), shape)
        except ValueError as error:
            raise methods.Unsupported(f"vitcod: {error}") from None
        return None

    def _decide(self, sparse: ViTCoDViT) -> None:
        """Writes the masks of all blocks into their buffers: the phase `mask`."""
        settings, given = self.settings, self._given(sparse)
        if settings.average_path is not None:
            for attention, average in zip(sparse.attentions, given, strict=True):
                attention.average.copy_(average)
        found = given if settings.mask_path is not None else self._made(sparse)
        _set_masks(sparse, found, DECIDED)

    def _made(self, sparse: ViTCoDViT) -> Tensor:
        """The masks that averaged attention becomes."""
        settings, prefix = self.settings, sparse.num_prefix_tokens
        average = torch.stack([attention.average for attention in sparse.attentions])
        if settings.method == "random":
            return masks.random_masks(tuple(average.shape), settings.sparsity, prefix)
        if settings.method == "ratio":
            return masks.ratio_masks(average, settings.sparsity, prefix)
        if settings.method == "std":
            return masks.std_masks(average, settings.std_factor)
        cut = settings.info_cut
        return masks.info_masks(
            average, masks.cut_for(average, settings.sparsity, prefix) if cut is None else cut, prefix
        )

    def calibrate(self, sparse: ViTCoDViT, images: Tensor, keep_rate: float) -> None:
        """The given masks, or a pattern as sparse as the setting says (0.9 where that is a cut or a factor)."""
        if self.settings.mask_path is not None:
            _set_masks(sparse, self._given(sparse), DECIDED)
            return
        settings = self.settings
        sparsity = settings.sparsity if settings.aims_at_sparsity else Settings.model_fields["sparsity"].default
        pattern = masks.patterned_mask(
            sparse.tokens, sparse.attentions[0].num_heads, sparsity, sparse.num_prefix_tokens
        )
        _set_masks(sparse, [pattern] * len(sparse.blocks), MADE_UP)

    def deploy(self, sparse: ViTCoDViT) -> ViTCoDViT:
        deployed = copy.deepcopy(sparse).eval()
        for attention in deployed.attentions:
            deploy_attention(attention)
        return deployed.requires_grad_(False)

    def report(self, module: ViTCoDViT, images: Tensor) -> methods.Report:
        blocks = self._blocks(module)
        return methods.Report(
            blocks,
            overhead=self._coding(module),
            remarks=tuple(self._remarks(module, blocks)),
            estimates=tuple(self._estimates(module, blocks)),
        )

    def _blocks(self, sparse: ViTCoDViT) -> tuple[methods.BlockReport, ...]:
        has_masks = int(sparse.masks_are) != EVERYTHING
        return tuple(
            replace(
                block, attention_density=attention.kept.double().mean(dim=(1, 2))[None],
                attention=_pattern(attention) if has_masks else None,
            )
            for block, attention in zip(dense_report(sparse).blocks, sparse.attentions, strict=True)
        )  # fmt: skip

    def _coding(self, sparse: ViTCoDViT) -> tuple[methods.Overhead, ...]:
        """The auto-encoder as the paper has it: encoding and decoding of every token's channels."""
        found, coded = [], CODED[self.settings.svd_type]
        for index, attention in enumerate(sparse.attentions):
            matrices = 2 * len(coded) * attention.num_heads * hidden_heads(attention.num_heads)
            macs = torch.tensor([matrices * attention.head_dim * sparse.tokens], dtype=torch.float64)
            if coded:
                found.append(methods.Overhead(f"blocks.{index}.attn", macs, block=index))
        return tuple(found)

    def _remarks(self, module: ViTCoDViT, blocks: Sequence[methods.BlockReport]) -> Iterator[str]:
        if int(module.masks_are) == MADE_UP:
            yield "its masks are a made-up pattern (columns and a band), as sparse as asked for: nothing was trained"
        kept = torch.stack([block.attention_density for block in blocks]).mean().item()
        if kept < 1:
            wanted = self.settings.sparsity
            text = f"prunes {1 - kept:.3f} of the attention entries"
            yield text + (
                f", not {wanted:g}" if self.settings.aims_at_sparsity and abs(1 - kept - wanted) > 0.005 else ""
            )

    def _estimates(self, module: ViTCoDViT, blocks: Sequence[methods.BlockReport]) -> Iterator[methods.Estimate]:
        if int(module.masks_are) == EVERYTHING or self.settings.svd_type not in ("mix_head_fc_qk", "none"):
            return  # their accelerator has a decoder for both, or for neither
        kept = [block.attention.kept for block in blocks]
        heads, width = len(kept[0]), module.attentions[0].head_dim
        rho = hidden_heads(heads) / heads if self.settings.svd_type != "none" else 1.0
        first, every = (simulate(kept, width, rho, which) for which in ("first", "all"))
        for name, cycles in (
            ("attention", first.attention),
            ("all", first.total),
            ("all, each head's own mask", every.total),
        ):
            yield methods.Estimate(f"ViTCoD's accelerator, {name}", cycles, MEGAHERTZ, ESTIMATE)

    def phases(
        self, sparse: ViTCoDViT, criterion: nn.Module, teacher: nn.Module | None = None
    ) -> Sequence[methods.TrainPhase | methods.CollectPhase | methods.TransformPhase]:
        settings, taken = self.settings, self._shares()
        found: list[methods.TrainPhase | methods.CollectPhase | methods.TransformPhase] = []
        if "basis" in taken:
            found.append(_collecting("basis", HeadStatistics(sparse), taken["basis"]))
        if "lowrank" in taken:
            objective = CodedObjective(sparse, criterion, teacher, settings.reconstruction)
            found.append(methods.TrainPhase(name="lowrank", objective=objective, share=taken["lowrank"]))
        if "average" in taken:
            found.append(_collecting("average", AverageAttention(sparse), taken["average"], settings.average_augmented))
        found.append(methods.TransformPhase(name="mask", apply=partial(self._decide, sparse)))
        trained = [parameter for parameter in sparse.parameters() if parameter.requires_grad]
        return [*found, methods.TrainPhase(
            name="finetune", objective=CodedObjective(sparse, criterion, teacher, settings.reconstruction),
            groups=[methods.Group("all", trained, lr_scale=settings.finetune_lr)], share=taken["finetune"],
        )]  # fmt: skip

    def _shares(self) -> dict[str, float]:
        """Of the phases that take place and spend something, in order; they sum to 1."""
        settings, has_code = self.settings, self.settings.svd_type != "none"
        takes_place = {
            "basis": has_code and settings.svd_init == "pca",
            "lowrank": has_code,
            "average": settings.averages,
            "finetune": True,
        }
        shares = {name: getattr(settings, f"{name}_share") for name, is_there in takes_place.items() if is_there}
        return {name: share / sum(shares.values()) for name, share in shares.items()}

    def convert_checkpoint(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """The authors' checkpoint. Their masks are in files of their own: see mask_path."""
        return converted(state_dict, self.settings.mask_path)


def _collecting(
    name: str, statistics: HeadStatistics | AverageAttention, share: float, augmented: bool = False
) -> methods.CollectPhase:
    return methods.CollectPhase(
        name=name, module=statistics, finish=statistics.finish, share=share, divided=True, augmented=augmented
    )


@torch.no_grad()
def _set_masks(sparse: ViTCoDViT, kept: Sequence[Tensor] | Tensor, they_are: int) -> None:
    for attention, mask in zip(sparse.attentions, kept, strict=True):
        attention.kept.copy_(mask)
    sparse.masks_are.fill_(they_are)


def _pattern(attention: CodedAttention) -> methods.FixedAttention:
    """What pictures and files show of a mask."""
    kept = attention.kept.cpu()
    moved = [reorder(mask) for mask in kept]
    average = attention.average
    average = None if average is None or not bool(average.any()) else average.cpu()
    return methods.FixedAttention(
        kept, average, torch.stack([one.label for one in moved]), torch.tensor([one.global_tokens for one in moved])
    )
