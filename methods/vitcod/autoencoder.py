"""The auto-encoder over the heads of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadCoder(nn.Module):
    """One direction: an affine map over the head axis, the same for every token and channel: [B, H_in, N, d] to [B, H_out, N, d]. Parameters lie as
    those of nn.Linear, so that the authors' checkpoints load."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.trunc_normal_(self.weight, std=0.02)  # as the ViT's own layers

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("gh,bhnd->bgnd", self.weight.to(x.dtype), x) + self.bias.to(x.dtype)[:, None, None]


def hidden_heads(heads: int) -> int:
    """ceil(H / 2): 2 of DeiT-T's 3 heads, half of DeiT-S's and DeiT-B's."""
    return -(-heads // 2)


@torch.no_grad()
def set_basis(encoder: HeadCoder, decoder: HeadCoder, mean: Tensor, covariance: Tensor) -> None:
    """The best affine code of that many numbers: the principal components of the head axis. mean [H], covariance [H, H]."""
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -len(encoder.weight) :]
    encoder.weight.copy_(basis.T)
    encoder.bias.copy_(-(basis.T @ mean))
    decoder.weight.copy_(basis)
    decoder.bias.copy_(mean)


def combined(encoder: HeadCoder, decoder: HeadCoder) -> tuple[Tensor, Tensor]:
    """Both as one affine map over the heads: [H, H] and [H]."""
    return decoder.weight @ encoder.weight, decoder.weight @ encoder.bias + decoder.bias
