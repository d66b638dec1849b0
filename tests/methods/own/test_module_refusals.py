"""Modules of methods of one's own that are refused when a model is tuned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.plain import distance
from test_registry import _settings, as_before  # noqa: F401
from torch import Tensor, nn

from vpt_fast import (
    BlockInfo,
    PromptModule,
    Prompts,
    VPTDeep,
    initialise,
    prompt_tune,
    register_method,
)
from vpt_fast.methods import modules_of


def made(function: Callable[..., Any], reads: str = "nothing", shared: Any = None) -> Any:
    """Return settings of a method whose module returns `function(module, *inputs)`."""

    class Own(PromptModule):
        def __init__(self, method: Any, block: BlockInfo) -> None:
            super().__init__()
            self.tokens = block.new_parameter(3, block.width)
            self.heads = nn.Parameter(torch.zeros(2, block.num_heads, block.head_dim))

        def forward(self, *inputs: Any) -> Any:
            return function(self, *inputs)

    Own.reads = reads
    settings = _settings()
    register_method("own", settings, shared)(Own)
    return settings


def _pair(module: Any, x: Tensor) -> Prompts:
    keys = module.heads.expand(len(x), -1, -1, -1)
    return Prompts(keys=keys, values=keys)


WRONG: dict[str, tuple[Callable[..., Any], str, type, str]] = {
    "width": (lambda m: m.tokens[:, 1:], "nothing", ValueError, r"rows have shape \(3, 63\);"),
    "one row": (lambda m: m.tokens[0], "nothing", ValueError, r"\(p, 64\) is needed"),
    "images": (lambda m: m.tokens[None].repeat(2, 1, 1), "nothing", ValueError, r"\(p, 64\) is"),
    "batch": (lambda m, x: m.tokens[None].repeat(2, 1, 1), "tokens", ValueError, r"or \(B, p, 64"),
    "one image": (
        lambda m, x: m.tokens[None], "tokens", ValueError, r"\(1, 3, 64\) for 3 images; \(p",
    ),
    "keys alone": (lambda m: Prompts(keys=m.heads), "nothing", ValueError, "keys and values are"),
    "fewer values": (
        lambda m: Prompts(keys=m.heads, values=m.heads[:1]), "nothing", ValueError, "2 keys, but 1",
    ),
    "heads": (
        lambda m: Prompts(keys=m.heads[:, 1:], values=m.heads), "nothing", ValueError,
        r"keys have shape \(2, 1, 32\); \(n, 2, 32\) is needed",
    ),
    "nothing": (lambda m: Prompts(), "nothing", ValueError, "forward made no prompts"),
    "no prompts": (lambda m: m.tokens[:0], "nothing", ValueError, "forward made no prompts"),
    "a list": (lambda m: [m.tokens], "nothing", TypeError, "forward returned a list; return P or"),
    "reads": (lambda m: m.tokens, "everything", ValueError, "reads is 'everything'; use one of"),
    "feature": (lambda m, f: m.tokens, "feature", ValueError, "reads a feature, but no module"),
    "keys of each image": (
        lambda m, x: Prompts(keys=_pair(m, x)[1], values=m.heads), "tokens", ValueError,
        "keys are of each image and the other is not",
    ),
    "values of each image": (
        lambda m, x: Prompts(keys=m.heads, values=_pair(m, x)[1]), "tokens", ValueError,
        "values are of each image and the other is not",
    ),
    "integers": (lambda m: m.tokens.long(), "nothing", TypeError, "rows are of torch.int64"),
    "device": (lambda m: m.tokens.to("meta"), "nothing", ValueError, "rows are on meta, the mod"),
    "in place": (
        lambda m, x: m.tokens + x[:, :1].zero_().sum(), "tokens", ValueError, "its input in place",
    ),
    "its own error": (lambda m: m.tokens @ m.tokens, "nothing", RuntimeError, "shapes cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_modules_are_refused_and_the_model_is_as_it_was(case: str) -> None:
    function, reads, error, why = WRONG[case]
    method, base = made(function, reads), families.build("vit")
    before = copy.deepcopy(base)
    with pytest.raises(error, match=why):
        prompt_tune(base, method(3))
    assert type(base) is type(before) and [*base.state_dict()] == [*before.state_dict()]
    assert not hasattr(base, "tune_record")
    image = families.images("vit")
    assert torch.equal(base(image), before(image))
    if error is not RuntimeError:
        assert prompt_tune(base, VPTDeep(2)) is base


@pytest.mark.parametrize("reads", ["nothing", "tokens"])
def test_a_forward_that_does_not_take_what_it_reads(reads: str) -> None:
    class Own(PromptModule):
        def __init__(self, method: Any, block: BlockInfo) -> None:
            super().__init__()
            self.tokens = block.new_parameter(3, block.width)

    def of_tokens(self: Any, x: Tensor) -> Tensor:
        return self.tokens + x[:, :1]

    def of_nothing(self: Any) -> Tensor:
        return self.tokens

    forward: Any = of_tokens if reads == "nothing" else of_nothing
    settings = _settings()
    register_method("own", settings)(Own)
    Own.reads = reads
    with pytest.raises(NotImplementedError, match="Own has no forward, which returns"):
        prompt_tune(families.build("vit"), settings(2))
    Own.forward = forward  # type: ignore[method-assign]
    why = {
        "nothing": r"Own of method 'own', block 0: reads is 'nothing', so that forward is called "
        r"with no argument; a forward of the block's input needs reads = \"tokens\", and its arg",
        "tokens": r"reads is 'tokens', so that forward is called with x \(B, N, D\), and its argu",
    }[reads]
    with pytest.raises(TypeError, match=why):
        prompt_tune(families.build("vit"), settings(2))


class _Lone(PromptModule):
    def __init__(self, method: Any) -> None:
        super().__init__()


class _Named(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.shared: Any = nn.Linear(2, 2)  # type: ignore[misc]


class _Dropout(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.dropout = 0.5


class _Number(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.sources: Any = 4  # type: ignore[method-assign]


class _Method(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()

    def made(self) -> None:  # type: ignore[override]
        pass


class _American(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()

    def initialize(self, inputs: Tensor, weights: Any) -> None:
        pass


class _Attribute(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.part.scale = torch.ones(1)


class _Frozen(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.like = block.like


class _Lazy(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.later = nn.LazyLinear(3)


class _Complex(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


CONSTRUCTED = {
    _Lone: (TypeError, "_Lone is called with the settings and a BlockInfo, and its arguments"),
    _Named: (ValueError, "'shared' is a name of PromptModule's own; take another"),
    _Dropout: (ValueError, "'dropout' is a name of PromptModule's own"),
    _Number: (ValueError, "'sources' is a name of PromptModule's own"),
    _Method: (ValueError, "'made' is a name of PromptModule's own"),
    _American: (ValueError, "has initialize, which nothing calls; the name is initialise"),
    _Attribute: (ValueError, "scale is a tensor, but no parameter and no buffer, .*register_buf"),
    _Frozen: (ValueError, "like is a weight of the model, and would be trained"),
    _Lazy: (ValueError, "is created when it is first called, which adapters cannot hold"),
    _Complex: (ValueError, "is complex, which adapters cannot hold; .* as two real ones"),
}


@pytest.mark.parametrize("module", CONSTRUCTED)
def test_constructors(module: Any) -> None:
    settings, base = _settings(), families.build("vit")
    register_method("own", settings)(module)
    error, why = CONSTRUCTED[module]
    with pytest.raises(error, match=why):
        prompt_tune(base, settings(2))
    assert not hasattr(base, "tune_record")


@pytest.mark.parametrize(
    ("shared", "error", "why"),
    [
        (lambda method, block: 5, TypeError, "made a int; a torch.nn.Module is needed"),
        (lambda method: nn.Identity(), TypeError, "is called with the settings and a BlockInfo"),
        (lambda method, block: nn.Module(), TypeError, "and it has no forward"),
        (lambda method, block: _Function(lambda: 1), TypeError, r"called with x \(B, N, D\)"),
        (lambda method, block: _Function(lambda x: None), ValueError, "returned None for an image"),
        (lambda method, block: _Function(lambda x: x.add_(1)), ValueError, "its input in place"),
    ],
    ids=["no module", "settings alone", "no forward", "no argument", "None", "in place"],
)
def test_shared_modules(shared: Any, error: type, why: str) -> None:
    method = made(lambda m, f: m.tokens, "feature", shared)
    with pytest.raises(error, match=why):
        prompt_tune(families.build("vit"), method(2))


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function  # type: ignore[method-assign]


def test_no_prompt_module() -> None:
    settings = _settings()
    register_method("own", settings)(lambda method, block: nn.Linear(2, 2))
    with pytest.raises(TypeError, match="made a Linear for block 0; derive it from vpt_fast.Prom"):
        prompt_tune(families.build("vit"), settings(2))


@pytest.mark.parametrize(
    ("after", "error", "why"),
    [
        (
            lambda rows: rows[:, :5],
            ValueError,
            r"rows of after_dropout have shape \(3, 5\); \(p, 64",
        ),
        (lambda rows: None, TypeError, "after_dropout returned a NoneType; return rows"),
        (lambda rows: rows[:0], ValueError, "forward made no prompts"),
    ],
)
def test_after_dropout(after: Callable[[Tensor], Any], error: type, why: str) -> None:
    method = made(lambda m: m.tokens)
    kind: Any = _modules_of(method)
    kind.after_dropout = lambda self, rows: after(rows)
    with pytest.raises(error, match=why):
        prompt_tune(families.build("vit"), method(3))
    kind.after_dropout = lambda self, rows: rows[:2]
    assert prompt_tune(families.build("vit"), method(3)).blocks[0].prompt.num_rows == 2  # type: ignore[union-attr, index]


def _modules_of(method: Any) -> Any:
    return modules_of(method(3)).block


def test_settings_that_leave_out_the_checks_of_the_base() -> None:
    settings = made(lambda m: m.tokens)
    settings.__post_init__ = lambda self: None
    with pytest.raises(ValueError, match="num_prompts must be at least 0, got -3"):
        prompt_tune(families.build("vit"), settings(-3))
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 9"):
        prompt_tune(families.build("vit"), settings(3, 9.0))
    assert prompt_tune(families.build("vit"), settings(3, 0.5)).blocks[0].prompt.dropout == 0.5  # type: ignore[union-attr, index]


def test_no_prompts_as_asked() -> None:
    """A module that makes none of them is left out; one that makes none of three is refused."""
    settings = made(lambda m: m.tokens[:0])
    settings.prompted_blocks = lambda self, depth: tuple(range(depth - 1))
    base = families.build("vit")
    image = families.images("vit")
    expected = base(image)
    tuned: Any = prompt_tune(base, settings(0))
    assert not [n for n, _ in tuned.named_parameters() if "prompt" in n]
    assert distance(tuned(image), expected) <= 1e-12


def _replaces(module: Any, weights: Any) -> None:
    module.tokens = nn.Parameter(torch.zeros(5, 64))


def _adds(module: Any, weights: Any) -> None:
    module.register_buffer("more", torch.zeros(2))


def _breaks(module: Any, weights: Any) -> None:
    module.tokens[0, 0] = torch.nan


def _freezes(module: Any, weights: Any) -> None:
    weights.norm1.weight.zero_()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_replaces, r"Own.initialise replaced tokens; write into the tensor, as self.tokens.copy_"),
        (_adds, "Own.initialise replaced more; write into the tensor"),
        (_breaks, "Own.initialise set values of tokens that are not finite"),
        (_freezes, "Own.initialise changed frozen weights of the model; create it again"),
    ],
)
def test_initial_values(change: Callable[..., None], why: str) -> None:
    method = made(lambda m: m.tokens)
    kind = _modules_of(method)
    kind.initialise = lambda self, inputs, weights: change(self, weights)
    tuned: Any = prompt_tune(families.build("vit"), method(3))
    with pytest.raises(ValueError, match=why):
        initialise(tuned, families.images("vit"))
    assert tuned.tune_record.initialised is None
