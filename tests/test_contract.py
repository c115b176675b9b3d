"""The registry's doors, the contract, and the suite that checks it: it passes what is right and names what is broken."""

import sys
import textwrap

import pytest

import methods
from harness.conformance import check_method
from harness.rules import BACKBONES, RULES
from methods.core import registry

pytestmark = pytest.mark.rounding


def plug_in(tmp_path, body, name="broken"):
    """A plug-in whose method is the dense network with `body` in its class."""
    path = tmp_path / f"{name}.py"
    path.write_text(
        "import copy, torch, methods\nfrom torch import nn\nfrom methods.core.vit import dense_report\n\n\n"
        "@methods.register\nclass Broken(methods.Method):\n"
        f'    """A test."""\n\n    name = "{name}"\n\n'
        "    def sparsify(self, vit):\n        return copy.deepcopy(vit)\n\n"
        + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return methods.load_plugin(path)[0]


@pytest.fixture(autouse=True)
def _forget_plug_ins():
    yield
    for name, cls in list(registry._registered.items()):
        if not cls.__module__.startswith("methods."):
            del registry._registered[name]
            registry._plug_ins.clear()
            sys.modules.pop(cls.__module__, None)


ALIKE = {
    "random": ("plain",),
    "magnitude": ("plain",),
    "dense": ("plain",),
}  # on other backbones they are as dynamicvit and svite


@pytest.mark.parametrize("name", ["dense", "dynamicvit", "random", "svite", "magnitude", "sttabt"])
def test_built_in_methods_keep_the_contract(name):
    findings = check_method(methods.create(name), ALIKE.get(name, tuple(BACKBONES)))
    assert not [finding for finding in findings if not finding.passed]


@pytest.mark.parametrize(
    "settings",
    [
        {"growth": "random", "density": 0.5},
        {"token_number": 0.6, "mode": "gather", "pruning_type": "structured"},
        pytest.param({"growth": "momentum", "death": "SET"}, marks=pytest.mark.long),
        pytest.param({"token_number": 0.6, "eval_noise": 1, "density": 0.5}, marks=pytest.mark.long),
    ],
)
def test_sparse_training_keeps_the_contract_while_masks_move(settings):
    """With updates after the second and the fourth of the suite's six steps."""
    findings = list(check_method(methods.create("svite", update_frequency=2, **settings), ("plain",)))
    assert len(findings) == len(RULES)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.7},
        pytest.param(
            {"sparsity": 0.7, "svd_type": "none", "method": "std", "average_augmented": True, "average_share": 0.5},
            marks=pytest.mark.long,
        ),
        pytest.param({"sparsity": 0.7, "svd_type": "mix_head_fc_q", "svd_init": "official"}, marks=pytest.mark.long),
        pytest.param({"sparsity": 0.7, "method": "random"}, marks=pytest.mark.long),
    ],
)
def test_fixed_masks_keep_the_contract(settings):
    findings = list(check_method(methods.create("vitcod", **settings), ("plain",)))
    assert len(findings) == len(RULES)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "topk"},
        pytest.param({"variant": "manual"}, marks=pytest.mark.long),
        pytest.param({"variant": "topk", "attention": "actual"}, marks=pytest.mark.long),
        pytest.param({"prediction": 200, "factor": 8}, marks=pytest.mark.long),
    ],
)
def test_variants_of_back_tracking_keep_the_contract(settings):
    findings = list(check_method(methods.create("sttabt", **settings), ("plain",)))
    assert len(findings) == len(RULES)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]


def test_dense_plus_keeps_the_contract():
    name, settings = methods.REFERENCE
    findings = list(check_method(methods.create(name, **settings), ("plain",)))
    assert len(findings) == len(RULES)
    assert all(finding.passed for finding in findings)


def test_a_plug_in_keeps_the_contract(toy_file):
    (name,) = methods.load_plugin(toy_file)
    findings = list(check_method(methods.create(name)))
    assert {finding.backbone for finding in findings} == set(BACKBONES)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]


BROKEN = {
    "leaves the backbone alone": "def sparsify(self, vit):\n    return vit",
    "keeps parameter names": """
        def sparsify(self, vit):
            return nn.Sequential(copy.deepcopy(vit))
        def report(self, module, images):
            return dense_report(module[0])
        """,
    "gradients reach what is trained": """
        def sparsify(self, vit):
            sparse = copy.deepcopy(vit)
            sparse.unused = nn.Linear(3, 3)
            return sparse
        """,
    "trains within its shares": """
        def phases(self, sparse, criterion, teacher=None):
            phase = super().phases(sparse, criterion, teacher)[0]
            phase.share = 0.7
            return [phase]
        """,
    "maps images to logits": """
        def deploy(self, sparse):
            fast = copy.deepcopy(sparse).eval()
            fast.head = nn.Identity()
            return fast
        """,
    "shapes are final": """
        def phases(self, sparse, criterion, teacher=None):
            def add():
                sparse.register_buffer("late", torch.zeros(3))
            return [*super().phases(sparse, criterion, teacher), methods.TransformPhase(name="late", apply=add)]
        """,
    "checkpoint round trip": """
        def phases(self, sparse, criterion, teacher=None):
            def hide(step, steps):
                sparse.head_drop = nn.Sequential(nn.Identity())
                sparse.head_drop.register_forward_hook(lambda module, inputs, output: output * 1.5)
            (phase,) = super().phases(sparse, criterion, teacher)
            phase.after_step = hide
            return [phase]
        """,
    "deployed equals sparse": """
        def deploy(self, sparse):
            fast = copy.deepcopy(sparse).eval()
            with torch.no_grad():
                fast.blocks[3].mlp.fc1.weight.mul_(0.9)
            return fast
        """,
    "deployed can be saved": """
        def deploy(self, sparse):
            fast = super().deploy(sparse)
            fast.head_drop = nn.Sequential(nn.Identity())
            fast.head_drop.gain = sparse.head.weight.detach()[0]  # decides, and is no buffer
            fast.head_drop.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-5 * module.gain))
            return fast
        """,
    "predictions do not depend on the batch": """
        def sparsify(self, vit):
            sparse = copy.deepcopy(vit)
            sparse.head_drop = nn.Sequential(nn.BatchNorm1d(vit.embed_dim, affine=False, track_running_stats=False))
            return sparse
        """,
    "report is consistent": """
        def report(self, module, images):
            full = dense_report(module)
            return methods.Report(full.blocks[:-1])
        """,
    "evaluation reports the same": """
        work_varies = False

        def report(self, module, images):
            tokens = 20 + torch.arange(len(images))
            return methods.Report((methods.BlockReport(tokens, tokens, tokens),) * len(module.blocks))
        """,
    "costs can be counted": """
        def deploy(self, sparse):
            fast = copy.deepcopy(sparse).eval()
            fast.blocks.append(copy.deepcopy(fast.blocks[0]))
            return fast
        """,
    "waits for the device once": """
        def deploy(self, sparse):
            fast = super().deploy(sparse)
            fast.head_drop.register_forward_hook(lambda module, inputs, output: output * (1 if float(output.sum()) else 2))
            return fast
        """,
    "compiles in one graph": """
        def deploy(self, sparse):
            fast = super().deploy(sparse)
            fast.head_drop.register_forward_hook(lambda module, inputs, output: (torch._dynamo.graph_break(), output)[1])
            return fast
        """,
    "goes on after an interruption": """
        def phases(self, sparse, criterion, teacher=None):
            seen = []
            def remember(step, steps):
                seen.append(step)
                with torch.no_grad():
                    sparse.head.bias.add_(1e-3 * len(seen))
            (phase,) = super().phases(sparse, criterion, teacher)
            phase.after_step = remember
            return [phase]
        """,
    "can be divided": """
        def phases(self, sparse, criterion, teacher=None):
            class Spread(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.model = sparse
                def forward(self, images, targets, noise):
                    logits = self.model(images)
                    return {"classification": criterion(logits, targets), "spread": logits.mean(dim=0).pow(2).sum()}
            return [methods.TrainPhase(name="train", objective=Spread())]
        """,
    "two processes equal one": """
        def phases(self, sparse, criterion, teacher=None):
            (phase,) = super().phases(sparse, criterion, teacher)
            seen = []
            phase.objective.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean()))
            def use(step, steps):
                with torch.no_grad():
                    sparse.head.bias[0] += seen[-1]
            phase.after_step = use
            return [phase]
        """,
    "deterministic by seed": """
        def phases(self, sparse, criterion, teacher=None):
            import os
            def noise(step, steps):
                with torch.no_grad():
                    sparse.head.bias.add_(int.from_bytes(os.urandom(2), "big") * 1e-5)
            (phase,) = super().phases(sparse, criterion, teacher)
            phase.before_step = noise
            return [phase]
        """,
}


@pytest.mark.parametrize("rule", BROKEN)
def test_every_rule_finds_what_breaks_it(tmp_path, rule):
    name = plug_in(tmp_path, BROKEN[rule], "broken_" + rule.replace(" ", "_"))
    (one,) = (found for found in RULES if found.__name__.replace("_", " ") == rule)
    findings = list(check_method(methods.create(name), ("plain",), (one,)))
    assert [(finding.rule, finding.passed) for finding in findings] == [(rule, False)]


def test_there_is_a_broken_example_for_every_rule():
    assert {rule.__name__.replace("_", " ") for rule in RULES} == set(BROKEN)


def test_refusing_the_plain_backbone_is_broken_and_others_is_fine(tmp_path):
    body = 'def sparsify(self, vit):\n    if {}:\n        raise methods.Unsupported("because")\n    return copy.deepcopy(vit)'
    always = plug_in(tmp_path, body.format("True"), "always")
    assert [f.passed for f in check_method(methods.create(always), ("plain", "registers"))] == [False, True]
    some = plug_in(tmp_path, body.format("vit.num_prefix_tokens > 1"), "some")
    findings = list(check_method(methods.create(some), ("plain", "registers")))
    assert all(f.passed for f in findings)
    assert findings[-1].detail == "refused: because"


def test_names_come_without_importing_torch():
    import subprocess

    code = "import sys, methods; methods.available(); [methods.describe(n) for n in methods.available()]; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_of_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "other_package.py").write_text(
        "import copy, methods\n\nclass Other(methods.Method):\n    name = 'other'\n    def sparsify(self, vit):\n        return copy.deepcopy(vit)\n"
    )
    info = tmp_path / "other_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sparse_vit_bench.methods]\nother = other_package:Other\nlost = no_such_package\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert {"other", "lost"} <= set(methods.available())
    assert methods.create("other").name == "other"
    with pytest.raises(ValueError, match=r"'lost'.*no_such_package"):
        methods.create("lost")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_rat": 0.5}, ["dynamicvit", "'keep_rat'", "pruning_loc", "did you mean 'keep_rate'"]),
        ({"keep_rate": "many"}, ["dynamicvit.keep_rate", "'many'"]),
        ({"keep_rate": 0}, ["dynamicvit.keep_rate", "greater than 0"]),
    ],
)
def test_wrong_settings_are_value_errors_that_help(settings, words):
    with pytest.raises(ValueError, match="dynamicvit") as told:
        methods.create("dynamicvit", **settings)
    assert all(word in str(told.value) for word in words)
    assert "\n" not in str(told.value)


def test_an_unknown_method_shows_the_known_ones():
    with pytest.raises(
        ValueError, match=r"allowed: dense, dynamicvit, magnitude, random, sttabt, svite.*did you mean 'dynamicvit'"
    ):
        methods.create("dynamic_vit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "registers no method"),
        ("import methods\nraise RuntimeError('oh')\n", r"p\.py:2: RuntimeError: oh"),
        ("def f(:\n", r"p\.py:1: SyntaxError"),
        ("import methods\n@methods.register\nclass A(methods.Method):\n    name = 'dense'\n", "taken by a built-in"),
        ("import methods\n@methods.register\nclass A(methods.Method):\n    pass\n", "needs a class attribute `name`"),
    ],
)
def test_plug_ins_that_cannot_be_used_are_told(tmp_path, text, message):
    path = tmp_path / "p.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        methods.load_plugin(path)


def test_a_plug_in_may_register_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("import methods\n\nclass There(methods.Method):\n    name = 'there'\n")
    (tmp_path / "door.py").write_text("import methods\nfrom elsewhere import There\n\nmethods.register(There)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert methods.load_plugin(tmp_path / "door.py") == ["there"]


def test_loading_a_plug_in_twice_is_fine(toy_file):
    assert methods.load_plugin(toy_file) == methods.load_plugin(toy_file) == ["toy"]
