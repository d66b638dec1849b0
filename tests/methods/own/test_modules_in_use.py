"""Modules of one's own in use: buffers, shared tensors, updates, numbers that change, devices."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.adapter_editing import rewrite_tensors
from support.formulations import families
from support.formulations.any_method import AnyMethod
from support.formulations.plain import distance, redraw_prompts
from test_registry import _settings, as_before  # noqa: F401
from torch import Tensor, nn

from vpt_fast import (
    CVPT,
    E2VPT,
    BlockInfo,
    FrozenWeights,
    GateVPT,
    PromptModule,
    Prompts,
    VPTDeep,
    VPTShallow,
    bake,
    fold_backbone,
    initialise,
    load_adapter,
    prompt_tune,
    register_method,
    save_adapter,
)
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.published.e2vpt import prune
from vpt_fast.reference.vit import concatenated


class _Tokens(PromptModule):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.index, self.count = block.index, 3
        self.tokens = block.new_parameter(5, block.width)
        self.pair = nn.Parameter(torch.randn(2, 4, block.num_heads, block.head_dim))
        self.more(block)

    def more(self, block: BlockInfo) -> None:
        pass

    def forward(self, *inputs: Any) -> Any:
        return self.tokens[: self.count]


class _Update(nn.Module):
    def __init__(self, method: Any, block: BlockInfo) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.3))
        self.count = 3

    def forward(self, left: Tensor, entered: Tensor) -> Tensor:
        return (self.gate * left + (1 - self.gate) * entered)[:, : self.count]


def own(module: Any, blocks: Any = None, **parts: Any) -> Any:
    """Return settings of a method whose blocks have such modules."""
    settings = _settings()
    if blocks is not None:
        settings.prompted_blocks = lambda self, depth: blocks
    register_method("own", settings, **parts)(module)
    return settings(3)


def tuned_model(method: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    tuned: Any = prompt_tune(families.build("vit"), method, **options).eval()
    redraw_prompts(tuned)
    return tuned


def eager(tuned: Any) -> Any:
    """Return the model with prompts concatenated, and the tuned model's values."""
    found: Any = concatenated(families.build("vit"), tuned.tune_record.method).eval()
    for part, name in ((found.prompts, "prompt"), (found.updates, "prompt_update")):
        for index, module in part.items():
            module.load_state_dict(getattr(tuned.blocks[int(index)], name).state_dict())
    if found.shared is not None:
        found.shared.load_state_dict(tuned.prompt_shared.state_dict())
    return found


class _Averaging(_Tokens):
    reads = "tokens"

    def more(self, block: BlockInfo) -> None:
        self.norm = nn.BatchNorm1d(block.width)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("counts", torch.arange(3, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return self.tokens[:3] + self.norm(x.mean(1)).unsqueeze(1)


def test_running_averages_in_every_memory_mode(tmp_path: Path) -> None:
    """They are no weight that must not change before backward, and adapters hold them."""
    image, found = families.images("vit"), []
    for memory in MEMORY_MODES:
        tuned = tuned_model(own(_Averaging), memory=memory).train()
        tuned(image).square().sum().backward()
        found.append([p.grad for p in tuned.parameters() if p.grad is not None])
        assert int(tuned.blocks[1].prompt.norm.num_batches_tracked) == 1
    for grads in found[1:]:
        assert all(distance(a, b) <= 1e-10 for a, b in zip(grads, found[0], strict=True))
    tuned.blocks[2].prompt.flags[1] = True
    tuned.eval()
    save_adapter(tuned, tmp_path / "adapter")
    loaded: Any = load_adapter(families.build("vit"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(image), tuned(image))
    for name, buffer in tuned.named_buffers():
        if "prompt" in name:
            again = dict(loaded.named_buffers())[name]
            assert again.dtype == buffer.dtype and torch.equal(again, buffer), name


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("counts", torch.int64), ("tokens", torch.bool), ("flags", torch.float32)],
)
def test_tensors_of_another_type_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, key = tmp_path / "adapter", f"blocks.2.prompt.{name}"
    save_adapter(tuned_model(own(_Averaging)), folder)
    rewrite_tensors(folder, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))
    base = families.build("vit")
    with pytest.raises(ValueError, match=f"{key} is {dtype}, this model and method need"):
        load_adapter(base, folder)
    assert not hasattr(base, "tune_record")


def test_a_tensor_that_blocks_share(tmp_path: Path) -> None:
    common: list[nn.Parameter] = []

    class Own(_Tokens):
        def more(self, block: BlockInfo) -> None:
            del self.tokens, self.pair
            if block.index == 0:
                common[:] = [nn.Parameter(torch.randn(3, block.width))]
            self.tokens = common[0]

    tuned = tuned_model(own(Own))
    assert len({id(block.prompt.tokens) for block in tuned.blocks}) == 1
    save_adapter(tuned, tmp_path / "adapter")
    loaded: Any = load_adapter(families.build("vit"), tmp_path / "adapter").eval()
    assert len({id(block.prompt.tokens) for block in loaded.blocks}) == 1
    image = families.images("vit")
    assert torch.equal(loaded(image), tuned(image))
    loaded(image).square().sum().backward()
    tuned(image).square().sum().backward()
    assert distance(loaded.blocks[3].prompt.tokens.grad, tuned.blocks[0].prompt.tokens.grad) == 0


def test_models_on_the_meta_device() -> None:
    """Constructors may compute with values; what cannot be tried without them is not."""

    class Own(_Tokens):
        reads = "tokens"

        def more(self, block: BlockInfo) -> None:
            self.order = int(torch.randn(4).argmax())

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens[:3] * (2 if float(x.sum()) > 0 else 3)

    base = families.build("vit").to("meta")
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    tuned: Any = prompt_tune(base, own(Own))
    assert torch.equal(torch.rand(2), expected) and tuned.blocks[0].prompt.tokens.is_meta
    assert [block.prompt.num_rows for block in tuned.blocks] == [3, 3, 3, 3]


@pytest.mark.parametrize("module", ["kv", "rows and kv", "apart"])
def test_updates_need_rows_alone(module: str) -> None:
    class Own(_Tokens):
        attends_apart = module == "apart"

        def forward(self) -> Any:
            if module == "apart":
                return self.tokens
            return Prompts(self.tokens if "rows" in module else None, *self.pair)

    base = families.build("vit")
    with pytest.raises(ValueError, match="'own' updates prompt rows that live on, and its module"):
        prompt_tune(base, own(Own, blocks=(0,), update=_Update))
    assert prompt_tune(base, VPTDeep(2)) is base


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 2), (0, 3), (3,), (0, 1, 2, 3)])
def test_updates_of_rows_that_live_on(blocks: tuple[int, ...]) -> None:
    tuned = tuned_model(own(_Tokens, blocks=blocks, update=_Update))
    updated = {i for i, block in enumerate(tuned.blocks) if "prompt_update" in block._modules}
    assert updated == {i for i in range(blocks[0], 3) if i + 1 not in blocks}
    image = families.images("vit")
    assert distance(eager(tuned)(image), tuned(image)) <= 1e-10


@pytest.mark.parametrize("method", [GateVPT(3), VPTShallow(3)], ids=repr)
@pytest.mark.parametrize("pool", ["vit", "mae"])
def test_a_pruned_model(method: Any, pool: str) -> None:
    """Rows do not leave the block that has become the last one."""
    tuned: Any = prompt_tune(families.build(pool), method).eval()
    redraw_prompts(tuned)
    image = families.images(pool)
    with torch.no_grad():
        expected = tuned.forward_intermediates(image, indices=[1], intermediates_only=True)
        tuned.prune_intermediate_layers([1], prune_norm=False, prune_head=False)
        after = tuned.forward_intermediates(image, indices=[1], intermediates_only=True)
        assert distance(after[0], expected[0]) <= 1e-12
        prefix = tuned.num_prefix_tokens
        assert tuned.forward_features(image).shape[1] == prefix + tuned.patch_embed.num_patches
        assert tuned(image).isfinite().all()


def test_numbers_that_change() -> None:
    """Where rows live on their number is fixed; elsewhere it may be any."""
    image = families.images("vit")
    tuned = tuned_model(own(_Tokens, blocks=(0, 2)))
    tuned.blocks[0].prompt.count = 4
    with pytest.raises(ValueError, match="_Tokens made 4 prompts, and 3 when the model was tuned"):
        tuned(image)
    tuned.blocks[0].prompt.count, tuned.blocks[2].prompt.count = 3, 0
    with pytest.raises(ValueError, match="_Tokens made 0 prompts, and 3 when the model was tuned"):
        tuned(image)
    tuned = tuned_model(own(_Tokens, blocks=(0,), update=_Update))
    tuned.blocks[1].prompt_update.count = 2
    with pytest.raises(ValueError, match=r"_Update returned prompt rows of shape \(2, 2, 64\) for"):
        tuned(image)
    tuned = tuned_model(own(_Tokens))
    tuned.blocks[1].prompt.count = 5
    assert distance(eager_of_counts(tuned)(image), tuned(image)) <= 1e-10


def eager_of_counts(tuned: Any) -> Any:
    found = eager(tuned)
    for index, module in found.prompts.items():
        module.count = tuned.blocks[int(index)].prompt.count
    return found


@pytest.mark.parametrize("last", [2, 3])
@pytest.mark.parametrize("reading", ["nothing", "tokens"])
def test_attention_apart_where_rows_live_on(reading: str, last: int) -> None:
    """Rows of an earlier block neither read the prompts apart nor are read there."""

    class Apart(_Tokens):
        attends_apart, reads = True, reading

        def forward(self, *inputs: Any) -> Any:
            rows = super().forward()
            return rows + inputs[0].mean(1, keepdim=True) if inputs else rows

    def new(method: Any, block: BlockInfo) -> PromptModule:
        return (Apart if block.index == last else _Tokens)(method, block)

    tuned = tuned_model(own(new, blocks=(0, last)))
    image = families.images("vit")
    expected = eager(tuned)(image)
    assert distance(tuned(image), expected) <= 1e-10
    assert distance(bake(tuned)(image), expected) <= 1e-10
    tuned.blocks[last].prompt.tokens.data.normal_()
    assert distance(tuned(image), expected) > 1e-6


def test_a_module_that_sets_its_own_number() -> None:
    class Own(_Tokens):
        def more(self, block: BlockInfo) -> None:
            self.num_rows = 7

    tuned = tuned_model(own(Own))
    assert tuned.blocks[0].prompt.num_rows == 3
    assert tuned.blocks[0].prompt.shared is None and tuned.blocks[0].prompt.dropout == 0.0


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("kind", ["both", "tokens both", "per image and shared", "feature kv"])
def test_no_images(kind: str, memory: Any) -> None:
    tuned = tuned_model(AnyMethod(3, kind=kind), memory=memory).train()
    image = families.images("vit")[:0]
    logits = tuned(image)
    assert logits.shape == (0, 5)
    logits.sum().backward()
    for name, parameter in tuned.named_parameters():
        if "prompt." in name:
            assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("memory", ["speed", "minimal"])
def test_keys_and_values_alone(memory: Any) -> None:
    method = E2VPT(0, num_keys=3)
    tuned = tuned_model(method, memory=memory)
    assert [block.prompt.num_rows for block in tuned.blocks] == [0] * 4
    image = families.images("vit")
    assert distance(eager(tuned)(image), tuned(image)) <= 1e-10
    tuned(image).square().sum().backward()
    assert all(block.prompt.keys.grad.any() for block in tuned.blocks)


def test_pruning_again_takes_of_what_is_left() -> None:
    tuned = tuned_model(E2VPT(5, pieces=4))
    frozen = tuned.blocks[1].prompt.train()
    batches = [(families.images("vit"), torch.tensor([0, 1]))]
    masks: Any = tuned.prompt_shared
    assert prune(tuned, batches, 0.4, 0.25) == (2, 3)
    before = masks.token_mask.clone()
    assert prune(tuned, batches, 0.4, 0.0)[0] == 1
    assert int(masks.token_mask.sum()) == 2 and bool((masks.token_mask <= before).all())
    assert frozen.training and not tuned.training


def test_no_initial_values_of_folded_weights() -> None:
    tuned = tuned_model(VPTDeep(3, init="spt-mean"))
    fold_backbone(tuned)
    with pytest.raises(ValueError, match="initialise the prompts before fold_backbone"):
        initialise(tuned, families.images("vit"))


def test_initialise_takes_one_batch_or_several() -> None:
    seen: list[int] = []

    class Own(_Tokens):
        def initialise(self, inputs: Tensor, weights: FrozenWeights) -> None:
            seen.append(len(inputs))

    images = families.images("vit", batch=5)
    assert initialise(tuned_model(own(Own)), images) == 5 and seen == [5] * 4
    with pytest.raises(TypeError, match="batches hold a tuple; give tensors of images, without"):
        initialise(tuned_model(own(Own)), [(images, 0)])  # type: ignore[list-item]


def test_attention_apart_refuses_hooks_that_would_see_something_else() -> None:
    tuned = tuned_model(CVPT(3))
    before = copy.deepcopy(tuned)
    handle = tuned.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="is hooked, but tokens attend to prompts apart"):
        tuned(families.images("vit"))
    handle.remove()
    assert torch.equal(tuned(families.images("vit")), before(families.images("vit")))
