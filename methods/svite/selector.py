"""SViTE+: a learned choice of tokens before the first block."""

from __future__ import annotations

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.contract import Unsupported
from methods.core.noise import Noise, image_keys
from methods.core.precision import wide
from methods.core.pruning import after_prefix, take_tokens
from methods.core.report import BlockReport
from methods.core.vit import embed, specialise


class SelectingViT(VisionTransformer):
    """Modifies timm's VisionTransformer: a linear layer `gumbel` scores all tokens once, when positions have been added; the `token_number`
    highest go on, and the prefix tokens (CLS) whatever their scores.

    gathers: False multiplies the others by zero, as the authors' accuracy path does: the sequence keeps its length, an empty token is
        refilled by biases and residual branches, and it is k or k + 1 tokens that stay, since the prefix counts only where it is chosen. True drops
        them: the prefix and the best others, token_number altogether for every image.
    eval_seed: evaluation adds Gumbel noise (as the authors' does), a function of the seed and the image; None: no noise.
    temperature: of training's straight-through softmax; a buffer, since a schedule changes it.
    """

    token_number: int
    gathers: bool
    eval_seed: int | None

    def forward_features(self, x: Tensor, noise: Noise | None = None, *args, **kwargs) -> Tensor:
        if noise is None and self.eval_seed is not None:
            noise = Noise(self.eval_seed, 0, image_keys(x))
        x = embed(self, x)
        kept, weight = self.choose(x, noise)
        x = take_tokens(x, kept) if self.gathers else x
        x = x * weight.unsqueeze(-1).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_train(self, images: Tensor, noise: Noise) -> Tensor:
        """Logits [B, classes] with gradients for the scorer."""
        return self.forward_head(self.forward_features(images, noise))

    def choose(self, tokens: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, C] to what stays of them: places, int64, and weights, float32, which are ones and zeros with the gradients of a
        softmax (straight-through). Where tokens are dropped, both are [B, k], the prefix first; else places are [B, k] in the order of the
        scores, without the prefix where it was not chosen, and weights [B, N]."""
        prefix = self.num_prefix_tokens
        with torch.autocast(tokens.device.type, enabled=False):  # few bits would make many scores equal
            scores = (
                F.linear(wide(tokens), wide(self.gumbel.weight), wide(self.gumbel.bias)).squeeze(-1).log_softmax(dim=-1)
            )
        if noise is not None:
            scores = scores + noise.gumbel("tokens", tokens.shape[1])
        soft = (scores / (self.temperature if self.training else 1.0)).softmax(dim=-1)
        if self.gathers:
            best = scores[:, prefix:].topk(self.token_number - prefix, dim=1).indices
            kept = after_prefix(best, prefix)
            chosen = soft.gather(1, kept)
            weight = 1.0 - chosen.detach() + chosen
        else:
            kept = scores.topk(self.token_number, dim=1).indices
            weight = torch.zeros_like(soft).scatter(1, kept, 1.0) - soft.detach() + soft
        return kept, torch.cat([torch.ones_like(weight[:, :prefix]), weight[:, prefix:]], dim=1)

    @torch.no_grad()
    def block_reports(self, images: Tensor) -> tuple[BlockReport, ...]:
        """What is kept of images [B, 3, H, W], see `blocks_of`."""
        noise = Noise(self.eval_seed, 0, image_keys(images)) if self.eval_seed is not None else None
        return self.blocks_of(*self.choose(embed(self, images), noise))

    def blocks_of(self, kept: Tensor, weight: Tensor) -> tuple[BlockReport, ...]:
        """The same for every block: what `choose` chose, as the paper counts it; whether the others are skipped is another matter."""
        prefix = self.num_prefix_tokens
        if self.gathers:
            patches, count = kept[:, prefix:] - prefix, torch.tensor([kept.shape[1]])
        else:
            patches = (kept - prefix).sort(dim=1, descending=True).values.clamp(min=-1)
            count = (weight > 0.5).sum(dim=1)
        return tuple(BlockReport(keys=count, queries=count, mlp=count, kept=patches) for _ in self.blocks)


def add_selector(
    vit: VisionTransformer, token_number: int | float, gathers: bool, eval_seed: int | None, temperature: float
) -> SelectingViT:
    """A copy of `vit` that chooses tokens. token_number: prefix included; a float is the share of all tokens. Unsupported where that leaves
    no patch, or is more than there are."""
    sparse = specialise(vit, SelectingViT)
    tokens, prefix = vit.patch_embed.num_patches + vit.num_prefix_tokens, vit.num_prefix_tokens
    count = int(token_number * tokens + 0.5) if isinstance(token_number, float) else token_number
    if not prefix < count <= tokens:
        raise Unsupported(f"token_number {token_number}: {count} of {tokens} tokens, of which {prefix} always stay")
    sparse.token_number, sparse.gathers, sparse.eval_seed = count, gathers, eval_seed
    sparse.gumbel = nn.Linear(vit.embed_dim, 1)
    nn.init.trunc_normal_(sparse.gumbel.weight, std=0.02)
    nn.init.zeros_(sparse.gumbel.bias)
    sparse.register_buffer("temperature", torch.tensor(temperature), persistent=False)
    return sparse


def temperature(step: int, steps: int, start: float, end: float) -> float:
    """Of training, linear over the steps."""
    return start + (end - start) * step / steps
