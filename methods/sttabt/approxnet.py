"""The approximation network: a narrow copy of a vision transformer whose attention maps imitate the original's."""

from __future__ import annotations

import torch
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.contract import Unsupported
from methods.core.operators import scored_attention
from methods.core.precision import wide
from methods.core.vit import embed, heads_width, replace_attention, specialise
from methods.sttabt.observed import ObservedAttention

EPS = 1e-7


def standardised(scores: Tensor) -> Tensor:
    """Scores [B, H, Q, N] by the mean and the (biased) deviation of each row over the keys, through the normal distribution function: about
    uniform on (0, 1)."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    deviation = variance.clamp(min=1e-24).sqrt()  # a row of equal scores has no gradient otherwise
    return torch.special.ndtr(centred / (deviation + EPS))


def rated(scores: Tensor, kind: str) -> Tensor:
    """How much each query wants each key, [B, Q, N] float32, from scores [B, H, Q, N] before the softmax: the mean over heads of the standardised
    scores ("uniform", for concrete masks) or of the attention ("probabilities", for top-k)."""
    scores = wide(scores)
    return (standardised(scores) if kind == "uniform" else scores.softmax(dim=-1)).mean(dim=1)


class ScoringAttention(ObservedAttention):
    """Modifies ObservedAttention: returns, besides its output, how much each query wants each key (see `rated`).

    kind: which rating. kernel: "plain" is torch's operations; "scored" one pass that writes no map of a head to memory (float32, CPU, with a C++
    compiler): which is faster is measured when the model is timed.
    """

    kind: str = "uniform"
    kernel: str = "plain"
    work_differs = False

    def kernels(self, device: torch.device) -> tuple[str, ...]:
        fits = device.type == "cpu" and self.qkv.weight.dtype == torch.float32
        normalised = not isinstance(self.q_norm, nn.Identity) or not isinstance(self.k_norm, nn.Identity)
        return ("plain", "scored") if fits and not normalised else ("plain",)

    def use_kernel(self, name: str, device: torch.device) -> None:
        self.kernel = name

    def forward(self, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, C] to the output [B, N, C] and the rating [B, N, N]."""
        if self.kernel == "scored":
            out, rating = scored_attention(self.qkv(x), self.num_heads, self.kind == "uniform")
            return self.proj(self.norm(out)), rating
        q, k, v = self.heads(x)
        scores = self.scores(q, k)
        return self.attend(scores, v), rated(scores, self.kind)

    def first_rows(self, x: Tensor, count: int) -> Tensor:
        """The rating of the first `count` queries alone, [B, count, N], and nothing else: what the last layer is asked for."""
        width = heads_width(self)
        bias = (None, None) if self.qkv.bias is None else (self.qkv.bias[:width], self.qkv.bias[width : 2 * width])
        q = F.linear(x[:, :count], self.qkv.weight[:width], bias[0])
        k = F.linear(x, self.qkv.weight[width : 2 * width], bias[1])
        q, k = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in (q, k))
        return rated(self.scores(self.q_norm(q), self.k_norm(k)), self.kind)


class ApproxNet(VisionTransformer):
    """Modifies timm's VisionTransformer: nothing but its width, and that all attention is ScoringAttention."""

    def ratings(self, images: Tensor, outputs: int) -> list[Tensor]:
        """Of every block [B, N, N]; of the last, whose other queries nobody asks for, the first `outputs` rows [B, outputs, N]."""
        x, found = embed(self, images), []
        for block in self.blocks[:-1]:
            out, rating = block.attn(block.norm1(x))
            x = x + block.ls1(out)
            x = x + block.ls2(block.mlp(block.norm2(x)))
            found.append(rating)
        last = self.blocks[-1]
        return [*found, last.attn.first_rows(last.norm1(x), outputs)]

    def macs(self, outputs: int) -> float:
        """Multiply-adds per image of `ratings`."""
        patches, stem = self.patch_embed.num_patches, self.patch_embed.proj.weight.numel()
        tokens, total = patches + self.num_prefix_tokens, 0.0
        for block in self.blocks[:-1]:
            weights = sum(layer.weight.numel() for layer in block.modules() if isinstance(layer, nn.Linear))
            total += tokens * weights + 2 * tokens**2 * heads_width(block.attn)
        last = self.blocks[-1].attn
        return patches * stem + total + heads_width(last) * ((outputs + tokens) * self.embed_dim + outputs * tokens)

    def drop_what_chooses_nothing(self) -> None:
        """Takes out, for deployment, what no rating depends on."""
        last = self.blocks[-1]
        last.attn.proj = last.attn.norm = last.norm2 = last.mlp = nn.Identity()
        self.norm = self.fc_norm = self.head = nn.Identity()
        if hasattr(self, "head_dist"):
            self.head_dist = nn.Identity()


def narrowed(vit: VisionTransformer, factor: int) -> ApproxNet:
    """A copy of `vit` whose width and MLPs are divided by `factor`: each parameter takes every so-many-th entry of the original's, both flattened
    (nearest interpolation in one dimension). The classifier begins anew. Unsupported where a head or an MLP cannot be divided."""
    attention = vit.blocks[0].attn
    sizes = {"heads": attention.head_dim, "width": vit.embed_dim, "MLP": vit.blocks[0].mlp.fc1.out_features}
    if any(size % factor for size in sizes.values()):
        smallest = min(sizes.values())
        works = [f for f in range(1, smallest + 1) if all(size % f == 0 for size in sizes.values())]
        raise Unsupported(
            f"sttabt: factor {factor} does not divide this network's "
            f"{', '.join(f'{name} of {size}' for name, size in sizes.items())}; {', '.join(map(str, works))} do"
        )
    net = specialise(vit, ApproxNet)
    replace_attention(net, ScoringAttention)
    with torch.no_grad():
        for name, module in list(net.named_modules()):
            _narrow(module, factor, is_classifier=name in ("head", "head_dist"))
    net.pos_drop = nn.Identity()  # scores are without dropout
    net.embed_dim = net.num_features = net.head_hidden_size = vit.embed_dim // factor
    return net


def _narrow(module: nn.Module, factor: int, is_classifier: bool) -> None:
    """Divides a module's own parameters, and what it knows of its sizes."""
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            shape = _narrow_shape(module, list(parameter.shape), factor, is_classifier)
            setattr(module, name, nn.Parameter(nearest(parameter, shape)))
    if isinstance(module, nn.Linear):
        module.in_features = module.weight.shape[1]
        module.out_features = module.weight.shape[0]
        if is_classifier:
            module.reset_parameters()
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
    elif hasattr(module, "normalized_shape"):  # LayerNorm and its relatives
        module.normalized_shape = tuple(size // factor for size in module.normalized_shape)
    elif isinstance(module, Attention):
        module.head_dim = module.head_dim // factor
        module.scale = module.head_dim**-0.5
        if hasattr(module, "attn_dim"):  # timm 1.0.22 goes by the tokens' width
            module.attn_dim = heads_width(module)


def _narrow_shape(module: nn.Module, shape: list[int], factor: int, is_classifier: bool) -> list[int]:
    if isinstance(module, nn.Conv2d):
        return [shape[0] // factor, *shape[1:]]
    if isinstance(module, nn.Linear) and is_classifier:
        return [shape[0], *(size // factor for size in shape[1:])]
    if isinstance(module, nn.Linear):
        return [size // factor for size in shape]
    return [*shape[:-1], shape[-1] // factor]  # norms, scales, tokens, positions


def nearest(source: Tensor, shape: list[int]) -> Tensor:
    """A tensor of that shape whose entry m, flattened, is the source's entry floor(m * len(source) / len(it))."""
    count = 1
    for size in shape:
        count *= size
    places = torch.arange(count, device=source.device) * source.numel() // count
    return source.detach().flatten()[places].view(shape).clone()


def transfer_maps(vit: VisionTransformer, factor: int) -> nn.ModuleDict:
    """Linear maps from the narrow width to the wide one, of the hidden states of each layer and of the embedding: for distillation alone."""
    narrow, wide = vit.embed_dim // factor, vit.embed_dim
    hidden = nn.ModuleList(nn.Linear(narrow, wide) for _ in vit.blocks)
    return nn.ModuleDict({"hidden": hidden, "embedding": nn.Linear(narrow, wide)})
