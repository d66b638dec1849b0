"""Frozen weights cast once: the bits of a step, and weights and adapters after training."""

from __future__ import annotations

import pytest
import timm
import torch
from support.pictures import backbone
from support.training import pictures, save, train
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
    remove_prompts,
)
from vpt_fast.adapter.fingerprint import fingerprint
from vpt_fast.train.common.recipe import Recipe, init_head, resolve_amp_dtype
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import evaluate
from vpt_fast.train.loop.frozen_cast import FrozenCast, frozen_weights

METHODS = [
    VPTDeep(2),
    VPTShallow(2),
    VAPT(2),
    LinearProbe(),
    PartialTuning(1),
    BiasTuning(),
    AdapterTuning(4),
    FullTuning(),
]


SWIN = {"embed_dim": 32, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}


def tuned(method, name="test_vit"):
    torch.manual_seed(0)
    more = SWIN if "swin" in name else {}
    model = timm.create_model(name, num_classes=3, img_size=32, **more)
    init_head(model)
    return prompt_tune(model, method).train()


def gradients(model, images, labels):
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


class Casts(TorchDispatchMode):
    """A counter of the elements of matrices that are cast to another type."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype != out.dtype:
            self.elements += out.numel() if out.ndim == 2 else 0
        return out


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_step_has_the_bits_of_autocast_and_the_weights_come_back(method):
    model = tuned(method)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    loss, want = gradients(model, images, labels)
    with FrozenCast(model, torch.bfloat16) as cast:
        copies = [p for p in model.parameters() if p.dtype == torch.bfloat16]
        assert bool(copies) == (method.name != "full")
        assert cast.nbytes == 2 * sum(copy.numel() for copy in copies)
        found_loss, found = gradients(model, images, labels)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        with cast.originals():
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(loss, found_loss)
    assert found.keys() == want.keys()
    assert all(torch.equal(grad, want[name]) for name, grad in found.items())
    after = model.state_dict()
    assert all(v.dtype == before[n].dtype and torch.equal(v, before[n]) for n, v in after.items())


@pytest.mark.parametrize(
    ("name", "method"),
    [("test_vit", VPTDeep(2)), ("swin_tiny_patch4_window7_224", VPTDeep(2))],
)
def test_no_weight_is_cast_in_a_step(name, method):
    model = tuned(method, name)
    images, labels = torch.randn(1, 3, 32, 32), torch.tensor([1])
    head = sum(p.numel() for n, p in model.named_parameters() if n.endswith("head.weight"))
    with Casts() as today:
        gradients(model, images, labels)
    with FrozenCast(model, torch.bfloat16), Casts() as casts:
        gradients(model, images, labels)
    weights = sum(w.numel() for w in frozen_weights(model) if w.ndim == 2)
    assert today.elements > weights  # forward, and backward again
    width = model.blocks[-1].attn.qkv.in_features if name == "test_vit" else 0
    # The rest: rows of activations, and in a ViT the query of the head's row.
    assert casts.elements < head + 8 * 1024 + 4 * width**2
    assert casts.elements < 0.1 * today.elements


def test_a_run_in_bf16_leaves_an_adapter_for_the_original_weights(tmp_path):
    model = backbone()
    init_head(model)
    prompt_tune(model, VPTDeep(2, dropout=0.1))
    frozen = fingerprint(model.state_dict())
    recipe = Recipe(epochs=2, batch_size=8, lr=1.0, warmup_epochs=0, amp_dtype="bfloat16")
    seen = []

    def saving(tuned_model, directory):
        seen.append(all(p.dtype == torch.float32 for p in tuned_model.parameters()))
        return save(tuned_model, directory)

    val = make_loader(pictures(6, seed=1), 6)
    train(model, recipe, val_batches=val, output=tmp_path, save=saving)
    assert seen and all(seen)
    loaded = load_adapter(backbone(), tmp_path / "last")
    found = evaluate(loaded, val, progress=False, amp_dtype=torch.bfloat16)
    last = evaluate(model, val, progress=False, amp_dtype=torch.bfloat16)
    assert found.loss == pytest.approx(last.loss)
    after = fingerprint(model.state_dict())
    same = [name for name in after if "prompt" not in name and not name.startswith("head.")]
    assert all(after[name] == frozen[name] for name in same)
    plain = backbone().state_dict()
    removed = remove_prompts(model).state_dict()
    assert all(torch.equal(removed[n], plain[n]) for n in plain if not n.startswith("head."))


def test_a_run_that_fails_restores_the_weights(tmp_path):
    model = backbone()
    init_head(model)
    prompt_tune(model, VPTDeep(2))
    before = model.blocks[0].attn.qkv.weight.clone()

    def broken(*_):
        assert model.blocks[0].attn.qkv.weight.dtype == torch.float32
        raise OSError("no room")

    recipe = Recipe(epochs=1, batch_size=8, warmup_epochs=0, amp_dtype="bfloat16")
    loader = make_loader(pictures(8), 8)
    with pytest.raises(OSError, match="no room"):
        fit(model, loader, recipe, output=tmp_path, save=broken, progress=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight, before)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.float32


def test_float32_casts_nothing():
    model = tuned(VPTDeep(2))
    with FrozenCast(model, torch.float32) as cast:
        assert cast.nbytes == 0
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_default_precision_is_the_devices():
    assert resolve_amp_dtype("auto", torch.device("cpu")) == "float32"
    assert resolve_amp_dtype("float16", torch.device("cpu")) == "float16"
    if not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
            assert resolve_amp_dtype("auto", torch.device("cuda")) == "bfloat16"
            assert resolve_amp_dtype("float32", torch.device("cuda")) == "float32"
            patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
            assert resolve_amp_dtype("auto", torch.device("cuda")) == "float32"
