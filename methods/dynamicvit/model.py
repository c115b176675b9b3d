"""DynamicViT's network: the score predictors, the masked attention of training, and the gather of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.noise import Noise
from methods.core.precision import wide
from methods.core.pruning import StagedPruning
from methods.core.vit import embed, replace_attention, specialise


class ScorePredictor(nn.Module):
    """Log-probabilities of keeping and dropping each token, from its own and the kept tokens' mean features (eq. 1-5).

    Submodules carry the official names; truncated-normal weights (std 0.02), zero biases; LayerNorm eps 1e-5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
            nn.LogSoftmax(-1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Patch tokens x [B, n, C] and the mask of those still kept [B, n, 1] (None: all) to [B, n, 2]; channel 0 keeps."""
        local, pooled = self.in_conv(x).tensor_split((x.shape[-1] // 2,), dim=-1)
        if keep is None:
            pooled = pooled.mean(dim=1, keepdim=True)
        else:
            # The official code divides by the sum itself: 0/0 when an image has lost every token. Counts are at least 1
            # otherwise, so the clamp changes nothing else.
            pooled = (keep * pooled).sum(dim=1, keepdim=True) / keep.sum(dim=1, keepdim=True).clamp(min=1.0)
        return self.out_conv(torch.cat([local, pooled.to(local.dtype).expand(-1, x.shape[1], -1)], dim=-1))

    def macs(self, tokens: int) -> float:
        """Multiply-adds for that many tokens."""
        return float(tokens * sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear)))


def masked_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax over the keys that `policy` keeps, every token always seeing itself (eq. 10-11).

    logits [B, H, n, n], scaled; policy [B, n, 1] in {0, 1}, differentiable. In float32, cast back at the end. As in the
    official code, the row maximum is taken over all keys and eps/n is added to every weight; the paper has neither.
    """
    scores = wide(logits)
    tokens = scores.shape[-1]
    seen = policy.to(scores.dtype).transpose(1, 2).unsqueeze(1)  # [B, 1, 1, n]: the same keys for every head and query
    seen = seen + (1.0 - seen) * torch.eye(tokens, device=logits.device, dtype=scores.dtype)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * seen
    return ((weights + eps / tokens) / (weights.sum(dim=-1, keepdim=True) + eps)).to(logits.dtype)


class PolicyAttention(Attention):
    """Modifies timm's Attention: given a policy [B, n, 1] in the place of a mask, the softmax is `masked_softmax`, without
    attention dropout (as in the official code). Without one it is timm's attention, fused or not."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        if attn_mask is None:
            return super().forward(x)
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        weights = masked_softmax((q * self.scale) @ k.transpose(-2, -1), attn_mask)
        x = (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)
        return self.proj_drop(self.proj(self.norm(x)))


@dataclass
class TrainOutput:
    """What the training forward returns: logits [B, classes], patch features after the final norm [B, N, C], and the
    cumulative keep mask of each stage [B, N] (straight-through: 0/1 up to rounding)."""

    logits: Tensor
    features: Tensor
    decisions: list[Tensor]


class DynamicViT(StagedPruning):
    """Modifies timm's VisionTransformer: predictors before the blocks `pruning_loc`; in training, dropped tokens are hidden
    from the attention (the token count stays); in evaluation, they are removed."""

    def add_predictors(self) -> None:
        self.score_predictor = nn.ModuleList(ScorePredictor(self.embed_dim) for _ in self.pruning_loc)

    def keep_scores(self, stage: int, patches: Tensor, seen: None) -> Tensor:
        return self.score_predictor[stage](patches)[..., 0]

    def decide(self, stage: int, patches: Tensor, keep: Tensor, noise: Noise) -> Tensor:
        """The stage's own keep decision [B, N, 1] by Gumbel-softmax (tau 1), straight-through."""
        log_probabilities = wide(self.score_predictor[stage](patches, keep))
        soft = (log_probabilities + noise.gumbel(f"stage{stage}", *patches.shape[1:2], 2)).softmax(dim=-1)
        hard = F.one_hot(soft.argmax(dim=-1), 2).to(soft.dtype)
        return (hard - soft.detach() + soft)[..., 0:1]

    def forward_train(self, images: Tensor, noise: Noise) -> TrainOutput:
        """The training forward (section 3.2-3.3): masks instead of removal, so that gradients reach the predictors."""
        prefix = self.num_prefix_tokens
        x = embed(self, images)
        keep = wide(x.new_ones(len(x), x.shape[1] - prefix, 1))
        always = keep.new_ones(len(x), prefix, 1)
        decisions: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index in self.pruning_loc:
                keep = self.decide(len(decisions), x[:, prefix:], keep, noise) * keep
                decisions.append(keep.squeeze(-1))
            x = block(x, attn_mask=torch.cat([always, keep], dim=1))
        x = self.norm(x)
        return TrainOutput(self._masked_head(x, keep), x[:, prefix:], decisions)

    def _masked_head(self, x: Tensor, keep: Tensor) -> Tensor:
        """Logits from all tokens [B, prefix + N, C]; average pooling sees the kept ones alone, as it does after removal."""
        if self.global_pool != "avg":
            return self.forward_head(x)
        keep = keep.to(x.dtype)
        if self.pool_include_prefix:
            keep = torch.cat([keep.new_ones(len(x), self.num_prefix_tokens, 1), keep], dim=1)
        else:
            x = x[:, self.num_prefix_tokens :]
        pooled = (x * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1.0)
        return self.head(self.head_drop(self.fc_norm(pooled)))


def make_dynamic(
    vit: VisionTransformer,
    keep_rate: float,
    pruning_loc: Sequence[int] | None,
    behaviour: type[DynamicViT] = DynamicViT,
) -> DynamicViT:
    """A copy of `vit` that prunes tokens."""
    sparse = specialise(vit, behaviour)
    sparse.plan_pruning(keep_rate, pruning_loc)
    sparse.add_predictors()
    replace_attention(sparse, PolicyAttention)
    return sparse
