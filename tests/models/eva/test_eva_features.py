"""What surrounds a tuned Eva: adapters, banks, baking, inspection, memory, graphs, compilation."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import graphs
from support.adapters.banks import alone, fill, relative
from support.formulations import eva_families as families
from support.formulations.plain import assert_same, distance
from support.formulations.plain_eva import more_prefix, pair
from support.unchanged import assert_unchanged, snapshot
from timm.layers import apply_rot_embed_cat

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    MLPHead,
    PromptBank,
    VPTDeep,
    VPTShallow,
    load_adapter,
    remove_prompts,
    save_adapter,
)
from vpt_fast.analysis.activation_memory import PLAIN, SavedBytes
from vpt_fast.analysis.shares import attention_shares
from vpt_fast.bank import shared_pass
from vpt_fast.export import bake
from vpt_fast.train.loop.prefix_cache import SuffixModel, frozen_blocks

KINDS = (
    "dinov3",
    "dinov3_qkvb",
    "eva02_glu",
    "eva02_clip",
    "pe_core",
    "rope_mixed",
    "unfused_rope",
    "gated_rope",
)
STILL = VAPT(3, projector_dropout=0.0, channel_dropout=0.0)
METHODS: dict[str, Any] = {
    "deep": VPTDeep(3), "first": VPTDeep(3, blocks=[0]), "shallow": VPTShallow(3), "vapt": STILL,
    "adapter": AdapterTuning(4), "bias": BiasTuning(), "full": FullTuning(), "mlp": MLPHead(2),
}  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", KINDS)
def test_adapters_and_removal(family: str, method: str, tmp_path: Path) -> None:
    base = families.build(family)
    other = copy.deepcopy(base)
    before = snapshot(base)
    tuned, _ = pair(base, METHODS[method])
    image = families.images(family)
    expected = tuned.eval()(image)
    save_adapter(tuned, tmp_path / "adapter")
    loaded: Any = load_adapter(other, tmp_path / "adapter").eval()
    assert torch.equal(loaded(image), expected)
    for copied in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(copied(image), expected)
    remove_prompts(tuned)
    if method == "mlp":
        before.pop("identities")
    assert_unchanged(tuned, before)


def test_another_rotation_is_another_architecture(tmp_path: Path) -> None:
    tuned, _ = pair(families.build("eva02_glu"), VPTDeep(3))
    save_adapter(tuned, tmp_path / "adapter")
    other = families.build("eva02_glu")
    other.rope.temperature = 100.0
    with pytest.raises(ValueError, match="rope.temperature"):
        load_adapter(other, tmp_path / "adapter")


def test_augmentation_of_positions_is_of_training_alone(tmp_path: Path) -> None:
    names = ("shift_coords", "jitter_coords", "rescale_coords")
    tuned, _ = pair(families.build("dinov3"), VPTDeep(3))
    save_adapter(tuned, tmp_path / "adapter")
    other = families.build("dinov3")
    for name in names:
        setattr(other.rope, name, 1.5)
    other.rope.aug_active = True
    image = families.images("dinov3")
    loaded: Any = load_adapter(other, tmp_path / "adapter")
    assert torch.equal(loaded.train()(image), tuned.train()(image))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", KINDS)
def test_a_bank_gives_every_tasks_logits(
    family: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fused:
        monkeypatch.setattr(shared_pass, "uses_kernels", lambda x: True)
    model = families.build(family)
    bank = PromptBank(copy.deepcopy(model))
    methods = ["deep", "shared", "last", "vapt", "linear"]
    adapters = fill(bank, model, tmp_path, methods)
    order = [*methods, *reversed(methods)]
    image = families.images(family, batch=len(order))
    for found, name, one in zip(bank(image, order), order, image, strict=True):
        assert relative(found, alone(model, adapters[name], one[None])[0]) <= 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.covering
@pytest.mark.parametrize("method", ["deep", "first", "shallow", "vapt", "adapter", "mlp"])
@pytest.mark.parametrize("family", KINDS)
def test_baked_and_exported(family: str, method: str) -> None:
    tuned, _ = pair(families.build(family), METHODS[method])
    tuned.eval()
    image = families.images(family, batch=3)
    with torch.no_grad():
        expected = tuned(image)
        baked: Any = bake(tuned)
        assert distance(baked(image), expected) <= 1e-10
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(baked, (image[:2],), dynamic_shapes={"x": {0: batch}})
    assert distance(program.module()(image), expected) <= 1e-10


@pytest.mark.parametrize("method", [VPTDeep(3), VPTDeep(3, blocks=[0, 2]), VPTShallow(3)], ids=str)
@pytest.mark.parametrize("family", ["dinov3", "rope", "rope_mixed", "qk_norm", "eva02_clip"])
def test_shares_are_those_of_an_explicit_softmax(family: str, method: Any) -> None:
    tuned, plain = pair(families.build(family), method)
    image = families.images(family)
    found = {record.block: record for record in attention_shares(tuned, image)}
    blocks, prefix, rows = list(plain.model.blocks), tuned.num_prefix_tokens, []

    def record(attn: Any, inputs: Any, named: Any) -> None:
        heads = attn.num_heads
        if attn.qkv is None:
            q, k = (p(inputs[0]).unflatten(-1, (heads, -1)) for p in (attn.q_proj, attn.k_proj))
        else:
            qkv = attn.qkv(inputs[0])
            if getattr(attn, "q_bias", None) is not None:
                qkv = qkv + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
            q, k, _ = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        q, k = (n(t).transpose(1, 2) for n, t in ((attn.q_norm, q), (attn.k_norm, k)))
        first = attn.num_prefix_tokens
        q, k = (
            torch.cat([
                t[:, :, :first],
                apply_rot_embed_cat(t[:, :, first:], named["rope"], half=attn.rotate_half),
            ], 2)
            for t in (q, k)
        )  # fmt: skip
        rows.append((attn.scale * q @ k.mT).softmax(-1))

    for block in blocks:
        block.attn.register_forward_pre_hook(record, with_kwargs=True)
    counts = [plain.live for _ in plain.sequence(image)]
    for index, (weights, count) in enumerate(zip(rows, counts, strict=True)):
        if not count:
            assert index not in found
            continue
        queries = weights[:, :, :1]
        if tuned.global_pool != "token":
            queries = weights[:, :, prefix + count :]
        right = queries.mean(2)[..., prefix : prefix + count]
        assert distance(found[index].prompts, right) <= 1e-10


@pytest.mark.parametrize("family", KINDS)
def test_the_frozen_prefix_and_the_rest_are_the_model(family: str) -> None:
    tuned, _ = pair(families.build(family), VPTDeep(3, blocks=[1]))
    assert frozen_blocks(tuned) == 1
    image = families.images(family)
    rest = SuffixModel(tuned, 1)
    assert distance(rest(tuned.forward_until(image, 1)), tuned(image)) <= 1e-12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "memory"),
    [
        ("dinov3", "speed"),
        ("eva02_glu", "minimal"),
        ("rope_mixed", "minimal"),
        ("eva02_clip", "speed"),
    ],
)
def test_compiled(family: str, memory: str) -> None:
    torch._dynamo.reset()
    tuned, plain = pair(families.build(family, depth=2), VPTDeep(3), memory)
    image = families.images(family, batch=3)
    compiled = torch.compile(tuned.train(), fullgraph=True, backend="aot_eager")
    assert_same(tuned, plain, compiled(image), plain(image))
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [VPTDeep(2, dropout=0.5), VAPT(2)], ids=["deep", "vapt"])
@pytest.mark.parametrize("family", ["dinov3", "eva02_glu", "rope_mixed"])
def test_recorded_steps_have_the_same_bits(family: str, method: Any) -> None:
    def make() -> Any:
        return families.build(family, num_classes=3, dynamic_img_size=True).float()

    eager, graphed, capture = graphs.pair(method, make=make)
    for size in ((24, 24), (24, 24), *(() if method.name == "vapt" else ((40, 16), (16, 40)))):
        image = torch.randn(2, 3, *size)
        for model in (eager, graphed):
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            torch.nn.functional.cross_entropy(model(image), graphs.LABELS).backward()
        graphs.assert_same_gradients(eager, graphed)
    # Grids of 5 x 2 and 2 x 5 patches have as many rows, but tables of their own.
    assert len(graphed.tune_record.graphs) == (1 if method.name == "vapt" else 3)


def test_trained_frequencies_are_not_recorded() -> None:
    make = lambda: families.build("rope_mixed", num_classes=3).float()  # noqa: E731
    eager, graphed, _ = graphs.pair(FullTuning(), make=make)
    image = families.images("rope_mixed").float()
    for model in (eager, graphed):
        torch.nn.functional.cross_entropy(model(image), graphs.LABELS).backward()
    graphs.assert_same_gradients(eager, graphed)
    assert graphed.rope.freqs.grad.abs().max() > 0


def test_a_blocks_own_call_takes_any_table() -> None:
    """Also one with a dimension of images, as patch dropout gives it."""
    tuned, plain = pair(families.build("dinov3"), VPTDeep(3))
    x = torch.randn(2, 5 + 9, 64, dtype=torch.float64)
    for shape in ((9, 64), (2, 9, 64), (2, 1, 9, 64)):
        table = torch.randn(*shape, dtype=torch.float64)
        with more_prefix(plain.model.blocks[1], 3):
            prompt = plain.prompt(1, 2)
            rows = torch.cat([x[:, :5], prompt, x[:, 5:]], 1)
            expected = plain.model.blocks[1](rows, rope=table)
        expected = torch.cat([expected[:, :5], expected[:, 8:]], 1)
        assert distance(tuned.blocks[1](x, rope=table), expected) <= 1e-10


@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3"])
def test_no_more_is_kept_for_backward_than_without_prompts(name: str) -> None:
    """At 256 px, batch 64, bf16, in every memory mode; the second has a gated MLP."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    counter = SavedBytes(model, (3, 256, 256), torch.bfloat16)
    plain = counter.bytes_of(VPTDeep(10), PLAIN, 64)
    kept = {
        (p, mode): counter.bytes_of(VPTDeep(p), mode, 64)
        for p in (0, 10, 200)
        for mode in ("speed", "lean")
    }
    assert max(kept.values()) <= plain
    assert kept[200, "speed"] < 1.01 * kept[10, "speed"]
