"""What is gathered from training images: principal components of the heads, and averaged attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.core.pooled import total
from methods.vitcod.autoencoder import set_basis
from methods.vitcod.model import ViTCoDViT


class HeadStatistics(nn.Module):
    """First and second moments over the heads of the dense network's queries and keys, and the auto-encoder that follows from them."""

    def __init__(self, model: ViTCoDViT) -> None:
        super().__init__()
        self.model = model
        heads = [attention.num_heads for attention in model.attentions]
        self.register_buffer("sums", torch.zeros(len(heads), 2, heads[0], dtype=torch.float64))
        self.register_buffer("products", torch.zeros(len(heads), 2, heads[0], heads[0], dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor, targets: Tensor) -> None:
        with self.model.looking_back(with_codes=False):
            for index, attention, x in self.model.walk(images):
                q, k, _ = attention.queries_keys_values(x)
                for slab, value in enumerate((q, k)):
                    vectors = value.transpose(0, 1).flatten(1).double()  # [H, B N d]
                    self.sums[index, slab] += vectors.sum(dim=1)
                    self.products[index, slab] += vectors @ vectors.T
        self.count += vectors.shape[1]

    def finish(self) -> None:
        """Sets all auto-encoders, by the images of all processes."""
        for gathered in (self.sums, self.products, self.count):
            total(gathered)
        means = self.sums / self.count
        covariances = self.products / self.count - means[..., :, None] * means[..., None, :]
        for index, attention in enumerate(self.model.attentions):
            for slab, which in enumerate("qk"):
                if which in attention.coded:
                    coders = (getattr(attention, f"{kind}_{which}") for kind in ("encoder", "decoder"))
                    set_basis(*coders, means[index, slab], covariances[index, slab])


class AverageAttention(nn.Module):
    """The mean softmax attention of every block and head, [L, H, N, N], before there are masks."""

    def __init__(self, model: ViTCoDViT) -> None:
        super().__init__()
        self.model = model
        shape = (len(model.blocks), *model.attentions[0].kept.shape)
        self.register_buffer("sum", torch.zeros(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, images: Tensor, targets: Tensor) -> None:
        with self.model.looking_back(with_codes=True):
            for index, attention, x in self.model.walk(images):
                q, k, _ = attention.queries_keys_values(x)
                self.sum[index] += attention.attention(*attention.decoded(q, k)).float().sum(dim=0)
        self.count += len(images)

    def finish(self) -> None:
        """Writes the mean over the images of all processes into the model."""
        mean = total(self.sum) / total(self.count).clamp(min=1).to(self.sum.dtype)
        for attention, average in zip(self.model.attentions, mean, strict=True):
            attention.average.copy_(average)
