"""Compiled and exported models at many batch sizes: few graphs, and the eager model's results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.formulations import families, plain_swin
from support.formulations.plain import distance
from torch import Tensor, nn
from torch._guards import CompileContext
from torch._library.custom_ops import OPDEFS
from torch.torch_version import TorchVersion

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    prompt_tune,
)

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "dropped": VPTDeep(3, dropout=0.4),
    "shared": VPTDeep(3, shared=True, project_dim=6),
    "late": VPTDeep(3, blocks=[1]),
    "shallow": VPTShallow(3),
    "code": VAPT(3),
    "paper": VAPT(3, variant="paper"),
    "linear": LinearProbe(),
    "adapter": AdapterTuning(),
    "bias": BiasTuning(),
    "partial": PartialTuning(1),
    "mlp": MLPHead(),
    "full": FullTuning(),
}
SWIN = "one_stage"
QUICK = {("vit_32px", "code", True), (SWIN, "dropped", True)}
CASES = [
    (family, method, training)
    for family in ("vit_32px", SWIN)
    for method in METHODS
    for training in (True, False)
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that traces forward and backward, and counts compilations, not their retries."""

    def __init__(self) -> None:
        self._found: set[Any] = set()

    @property
    def graphs(self) -> int:
        return len(self._found)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self._found.add(CompileContext.current_compile_id())
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def tuned(family: str, method: Any, **options: Any) -> nn.Module:
    """Build a tuned model whose trained tensors differ from their initial values, often zero."""
    build = plain_swin.build if family in plain_swin.SWINS else families.build
    model = prompt_tune(build(family), method, **options)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * noise
    return model


def images(family: str, batch: int) -> Tensor:
    source = plain_swin.images if family in plain_swin.SWINS else families.images
    return source(family, batch=batch)


def step(call: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return logits, and in training the gradients of trained parameters, with a fixed seed."""
    torch.manual_seed(5)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not model.training:
        with torch.no_grad():
            return [call(x)]
    output = call(x)
    return [output, *torch.autograd.grad(output.square().sum(), trained, allow_unused=True)]


def assert_equal(found: list[Tensor], right: list[Tensor]) -> None:
    for ours, theirs in zip(found, right, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or distance(ours, theirs) <= 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method", "training"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.full]) for c in CASES],
)
def test_two_graphs_serve_all_batch_sizes(family: str, method: str, training: bool) -> None:
    model, backend = tuned(family, METHODS[method]).train(training), Counting()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (2, 3, 4, 7, 13):
        compiled_results = step(compiled, model, images(family, batch))
    assert backend.graphs <= 2
    assert_equal(compiled_results, step(model, model, images(family, 13)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method", "memory", "training"),
    [
        pytest.param("vit", "code", "speed", True),
        pytest.param("vit", "deep", "minimal", True, marks=pytest.mark.full),
        pytest.param("vit", "code", "speed", False, marks=pytest.mark.full),
        pytest.param("vit", "shallow", "minimal", True, marks=pytest.mark.full),
        pytest.param("window7", "code", "speed", True, marks=pytest.mark.full),
        pytest.param(SWIN, "shallow", "speed", False, marks=pytest.mark.full),
    ],
)
def test_blocks_compiled_by_themselves(
    family: str, method: str, memory: str, training: bool
) -> None:
    model = tuned(family, METHODS[method], memory=memory).train(training)
    right = {batch: step(model, model, images(family, batch)) for batch in (2, 3, 7)}
    blocks = [m for m in model.modules() if hasattr(m, "rows")]
    backend = Counting()
    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    for batch, expected in right.items():
        assert_equal(step(model, model, images(family, batch)), expected)
    # The first block's input needs no gradient, and few rows of the last block are read. Swin's
    # blocks also differ in width, grid and shift.
    assert 1 <= backend.graphs <= (3 if family == "vit" else len(blocks))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method", "names"),
    [
        ("vit_32px", "deep", ["blocks"]),
        pytest.param("vit_32px", "shallow", ["blocks"], marks=pytest.mark.full),
        pytest.param(
            *("tiny", "deep", ["layers.0.blocks", "layers.1.blocks"]),
            marks=pytest.mark.skipif(torch.__version__ < (2, 12), reason="refused, below"),
        ),
        pytest.param("tiny", "deep", ["layers"], marks=pytest.mark.full),
        ("tiny", "shallow", ["layers.0", "layers.1"]),
        pytest.param("tiny", "code", ["layers.0", "layers.1"], marks=pytest.mark.full),
        pytest.param("tiny", "shallow", ["layers.0.blocks.0"], marks=pytest.mark.full),
    ],
)
def test_rows_of_blocks_compiled_by_themselves(family: str, method: str, names: list[str]) -> None:
    model, backend = tuned(family, METHODS[method]).train(), Counting()
    x = images(family, 2)
    right = step(model, model, x)
    for name in names:
        model.get_submodule(name).compile(backend=backend)
    assert_equal(step(model, model, x), right)
    assert backend.graphs >= len(names)


def test_models_that_an_older_compiler_fails_on_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0+cpu"))
    model = tuned("tiny", METHODS["deep"])
    model.get_submodule("layers.0.blocks").compile(backend=Counting())
    with pytest.raises(ValueError, match="2.11.0.*compile the stage, each of its blocks or the"):
        model(images("tiny", 2))


@pytest.mark.parametrize("name", ["layers", "layers.0.blocks"])
def test_compiled_modules_that_prompt_rows_bypass_are_refused(name: str) -> None:
    model = tuned("tiny", METHODS["shallow"])
    model.get_submodule(name).compile(backend=Counting())
    with pytest.raises(ValueError, match="is hooked, compiled|are hooked, compiled"):
        model(images("tiny", 2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("vit_32px", "code"),
        pytest.param("vit_32px", "deep", marks=pytest.mark.full),
        pytest.param("vit_32px", "shallow", marks=pytest.mark.full),
        (SWIN, "deep"),
        pytest.param("window7", "code", marks=pytest.mark.full),
    ],
)
def test_exported_with_any_batch(family: str, method: str) -> None:
    model = tuned(family, METHODS[method]).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (images(family, 3),), dynamic_shapes={"x": {0: batch}}
    ).module()
    for size in (2, 5, 64):
        x = images(family, size)
        with torch.no_grad():
            assert distance(program(x), model(x)) <= 1e-10


def test_operators_reach_their_functions_directly() -> None:
    ours = [name for name in OPDEFS if name.startswith("vpt_fast::")]
    assert len(ours) >= 15
    for name in ours:
        for backend in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, backend), name


def test_in_place_operators_increment_the_version() -> None:
    h, grad = torch.randn(2, 3), torch.randn(2, 3)
    torch.ops.vpt_fast.activation_backward(h, None, grad, "gelu")
    assert grad._version
