"""Counting in the dispatcher: everywhere the same number, forward and backward, and nothing missed silently."""

import contextlib

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from harness.device import set_attention
from harness.dispatched import Products
from harness.executed import executed_macs
from harness.operations import UncountedOperation, has_formula, is_free, macs_of
from methods.core import operators

DEIT_S = 4_598_882_304
FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@pytest.fixture(scope="module")
def deit():
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224").eval()


def faked(model, device, dtype):
    """The model's shapes on another device, within a FakeTensorMode: nothing is computed."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device=device, dtype=dtype))
    return model


def counted(call):
    """Multiply-adds of a call, with gradients."""
    with Products() as products:
        call()
    return products.total


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deit_s_is_one_number_everywhere(deit, device, fused):
    set_attention(deit, fused)
    for dtype, mode in ((torch.float32, torch.no_grad), (torch.bfloat16, torch.inference_mode)):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model, images = faked(deit, device, dtype), torch.empty(2, 3, 224, 224, device=device, dtype=dtype)
            with mode():  # in inference mode operations come to the dispatcher whole, and not what they are made of
                assert executed_macs(model, images) == DEIT_S, dtype


@pytest.mark.parametrize("fused", [True, False])
def test_deit_s_really_running_is_that_number_too(fused):
    model = timm.create_model("deit_small_patch16_224").eval()
    set_attention(model, fused)
    assert executed_macs(model, torch.zeros(1, 3, 224, 224)) == DEIT_S


def test_torchs_counter_alone_misses_fused_attention():
    q = torch.randn(1, 2, 5, 8, requires_grad=True)

    def step():
        F.scaled_dot_product_attention(q, q, q).sum().backward()

    with FlopCounterMode(display=False) as alone:
        step()
    products = {FUSED: 2, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 5}
    known = sum(number for operator, number in products.items() if operator in flop_registry)  # none, up to torch 2.14
    assert alone.get_total_flops() / 2 == 5 * 5 * 8 * 2 * known
    assert counted(step) == 5 * 5 * 8 * 2 * (2 + 5)


class Attention(nn.Module):
    """A layer, attention, a layer."""

    def __init__(self, fused):
        super().__init__()
        self.before, self.after, self.fused = nn.Linear(8, 24), nn.Linear(8, 8), fused

    def forward(self, x):
        q, k, v = self.before(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT).softmax(dim=-1) @ v
        return self.after(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_training_costs_three_forwards_but_for_the_inputs_gradient(fused, autocast):
    """The first layer's input needs no gradient; fused attention computes its map once more in the backward."""
    model, x = Attention(fused), torch.randn(3, 5, 8)
    precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def step():
        with precision:
            loss = model(x).float().sum()
        loss.backward()

    first, attention, last = 3 * 5 * 8 * 24, 3 * 2 * 5 * 5 * 4 * 2, 3 * 5 * 8 * 8
    assert executed_macs(model, x) * 3 == first + attention + last
    assert counted(step) == 3 * (first + attention + last) - first + fused * attention / 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_cost_three_forwards(layer, groups):
    """torch's own formula counts the weight's gradient once for every group."""
    conv, x = layer(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 6, requires_grad=True)
    places = 4 * 4 if layer is nn.Conv2d else 6 * 6
    forward = 2 * places * 9 * 4 * 8 // groups
    assert executed_macs(conv, x) * 2 == forward
    assert counted(lambda: conv(x).sum().backward()) == 3 * forward


a, b, batch, v, u = torch.randn(3, 4), torch.randn(4, 5), torch.randn(2, 3, 4), torch.randn(4), torch.randn(3)
PRODUCTS = {
    "mm": (lambda: a @ b, 60),
    "mv": (lambda: a @ v, 12),
    "dot": (lambda: v @ v, 4),
    "vdot": (lambda: torch.vdot(v, v), 4),
    "addmv": (lambda: torch.addmv(u, a, v), 12),
    "in place": (lambda: torch.zeros(3, 5).addmm_(a, b), 60),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(2, 3, 3), batch, batch.mT), 72),
    "addbmm": (lambda: torch.addbmm(torch.zeros(3, 3), batch, batch.mT), 72),
    "einsum": (lambda: torch.einsum("bij,jk->bik", batch, b), 120),
    "broadcast": (lambda: a @ batch.mT, 72),
    "tensordot": (lambda: torch.tensordot(batch, b, dims=1), 120),
    "integers": (lambda: torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)), 4096),
    "views and points in place": (lambda: u.clone().unsqueeze_(0).gt_(0).squeeze_(0).t_().sum(), 0),
    "no product": (lambda: (a * a).sum() + torch.outer(u, v).topk(2).values.softmax(-1).sum(), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_products_in_every_form(name, mode):
    call, macs = PRODUCTS[name]
    with mode():
        assert counted(call) == macs


def test_attention_for_images_of_different_lengths():
    """Its kernel needs a GPU; its formula, the starts of images."""
    from torch.nn.attention import varlen  # noqa: F401  registers it

    operator = torch.ops.torch_attn._varlen_attn.default
    q, k, starts, others = torch.ones(5, 2, 8), torch.ones(7, 2, 8), torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
    macs = (2 * 3 + 3 * 4) * 2 * 8 * 2
    assert macs_of(operator, (q, k, k, starts, others, 3, 4), {}, None, frozenset()) == macs
    back = torch.ops.torch_attn._varlen_attn_backward.default
    rest = (k, torch.ones(2, 5), starts, others, 3, 4, False, torch.ones(2))
    assert macs_of(back, (q, q, k, k, *rest), {}, None, frozenset()) == macs * 2.5
    with FakeTensorMode() as mode:
        shapes_alone = [mode.from_tensor(x) for x in (q, k, k, starts, others)]
        with pytest.raises(UncountedOperation, match="without values"):
            macs_of(operator, (*shapes_alone, 3, 4), {}, None, frozenset())


def inside(function):
    """A model whose module `inner` calls a function."""

    class Inner(nn.Module):
        def forward(self, x):
            return function(x)

    return nn.Sequential(nn.Identity(), nn.Sequential()).append(Inner())


@torch.library.custom_op("tests::hidden_product", mutates_args=())
def hidden_product(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.linalg.det, "aten::_linalg_det in 2 has no rule"),
        (lambda x: hidden_product(x), "tests::hidden_product in 2 has no rule"),
        (lambda x: torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"), "aten::_cdist_forward in 2 "),
        (lambda x: x.to_sparse() @ x, "aten::_to_sparse in 2 "),
        (lambda x: torch.mm(SPARSE, x), "of a sparse_csr tensor in 2 "),
        (lambda x: torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, (x,)), "cond in 2 "),
        (lambda x: torch.nested.nested_tensor([x, x]) @ x, "aten::.*nested.* in 2 "),
    ],
)
def test_what_nobody_can_count_is_an_error_that_names_it_and_its_module(function, message):
    with pytest.raises(UncountedOperation, match=message):
        executed_macs(inside(function), torch.randn(4, 4))


SPARSE = torch.eye(4).to_sparse_csr()


def test_a_backward_that_nobody_can_count_is_an_error():
    operator = hidden_product

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 2

        @staticmethod
        def backward(context, grad):
            return operator(grad)

    with pytest.raises(UncountedOperation, match="tests::hidden_product in a backward"):
        counted(lambda: Hidden.apply(torch.randn(3, 3, requires_grad=True)).sum().backward())


def test_authors_say_what_their_operators_cost():
    model, x = inside(lambda x: hidden_product(x)), torch.randn(4, 4)
    try:
        assert operators.free(hidden_product) is hidden_product
        assert executed_macs(model, x) == 0
    finally:
        operators.FREE.discard("tests::hidden_product")
    try:
        operators.counted(lambda x: x[0] ** 3)("tests::hidden_product")
        assert executed_macs(model, x) * 4 == 64
    finally:
        del operators.RULES["tests::hidden_product"]


def test_compiled_code_hides_nothing():
    model, x = Attention(True).eval(), torch.randn(1, 5, 8)
    expected = executed_macs(model, x)

    def backend(graph, inputs):  # like a compiler's code, which calls kernels and no operators
        def run(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                return graph(*arguments)

        return run

    model.compile(backend=backend)
    with torch.no_grad():
        model(x)
    assert executed_macs(model, x) == expected > 0


def test_custom_operators_run_as_they_ship():
    """They are counted whole; some of what is compiled in them, flex attention with tiles, cannot run otherwise."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @operators.counted(lambda x: x[0])
    @torch.library.custom_op("tests::compiled_inside", mutates_args=())
    def compiled_inside(x: torch.Tensor) -> torch.Tensor:
        return torch.compile(lambda x: x * 2, backend=backend)(x)

    assert counted(lambda: compiled_inside(torch.ones(3))) == 3
    compiles = torch.torch_version.TorchVersion(torch.__version__) >= "2.11"  # 2.10 compiles nothing while it is counted
    assert len(graphs) == compiles


def test_tensors_made_of_tensors_are_looked_into():
    """Two images of three and five tokens."""
    layer = nn.Linear(4, 8)
    jagged = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=torch.jagged)
    assert counted(lambda: layer(jagged)) == (3 + 5) * 4 * 8


def test_a_module_that_fails_does_not_keep_what_follows():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("not here")

    class Falls(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Fails(), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            with contextlib.suppress(ValueError):
                return self.first(x)
            return self.second(x) @ torch.ones(4, 2)

    with Products(model := Falls()) as products:
        model(torch.ones(3, 4))
    assert products.by(0) == {"second": 48, "": 24}


def test_nothing_with_a_formula_is_free():
    """Neither torch's tags nor the list let a product through."""
    for name in """
        mm addmm bmm baddbmm addbmm mv addmv dot vdot convolution convolution_backward _int_mm _scaled_mm
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_fused_attention_overrideable_backward
    """.split():  # fmt: skip
        operator = getattr(torch.ops.aten, name).default
        assert has_formula(operator), name
        assert not is_free(operator), name


def test_an_operator_whose_name_ends_in_a_line_is_named_in_full():
    """torch's own are in place then; an author's may be called what it likes."""

    @operators.counted(lambda x: x[0] * 7)
    @torch.library.custom_op("tests::in_line_", mutates_args=())
    def in_line_(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert executed_macs(inside(lambda x: in_line_(x)), torch.ones(4, 4)) == 7
