"""`bake`: refusals, and baked models that are compiled or exported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import distance
from test_bake import EXACT, EXPERTS, deep, tune
from torch.export import Dim

import vpt_fast
from vpt_fast import VAPT, VPTDeep, VPTShallow, bake, prompt_tune


def test_refusals() -> None:
    image = families.images(TOKEN)
    with pytest.raises(ValueError, match="VisionTransformer is not tuned, .* call prompt_tune"):
        bake(families.build(TOKEN))
    arguments = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8}
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), **arguments)
    with pytest.raises(ValueError, match="SwinTransformer cannot be baked: prompts in windows"):
        bake(prompt_tune(swin, VPTDeep(2)))
    tuned = deep()
    handle = tuned.blocks[1].attn.qkv.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv has hooks"):
        bake(tuned)
    handle.remove()
    tuned.norm.forward = tuned.norm.forward
    with pytest.raises(ValueError, match="norm has a forward of its own"):
        bake(tuned)
    baked: Any = bake(deep())
    for options in ({"attn_mask": torch.ones(10, 10).bool()}, {"is_causal": True}):
        with pytest.raises(ValueError, match="takes neither attn_mask nor is_causal"):
            baked(image, **options)
        with pytest.raises(ValueError, match="takes neither attn_mask nor is_causal"):
            baked.blocks[0].attn(baked.patch_embed(image), **options)
    rows: Any = bake(tune(TOKEN, VPTShallow(2)))
    for call in (rows.forward_intermediates, rows.get_intermediate_layers):
        with pytest.raises(ValueError, match="rows pass through its blocks as tokens"):
            call(image)
    with pytest.raises(ValueError, match="rows pass through its blocks as tokens"):
        rows.prune_intermediate_layers(1)


def test_another_patch_grid_is_refused_where_experts_mix_patches() -> None:
    experts: Any = bake(prompt_tune(families.build("dynamic"), VAPT(2)))
    image = families.images("dynamic")  # 4 x 2 patches, not 3 x 3
    with pytest.raises(ValueError, match="mix a 3 x 3 grid of patches, but this image has 4 x 2"):
        experts(image)
    assert bake(tune("dynamic", VPTDeep(2)))(image).shape == (2, families.CLASSES)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    family = "vit_32px"
    baked = bake(tune(family, VPTDeep(3, blocks=[0])))
    compiled = torch.compile(baked, fullgraph=True, backend="aot_eager", dynamic=True)
    image = families.images(family, batch=3)
    for batch in (3, 2):
        with torch.inference_mode():
            assert distance(compiled(image[:batch]), baked(image[:batch])) <= EXACT


READER = """
import sys


class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vpt_fast", "timm"):
            raise ImportError(name + " was imported")


sys.meta_path.insert(0, Refused())
import torch

for path in sys.argv[1:]:
    images, expected = torch.load(path.replace(".pt2", ".pt"))
    model = torch.export.load(path).module()
    for part, right in zip(images, expected):
        found = model(part)
        assert (found - right).abs().max() <= 1e-12 * right.abs().max(), path
    print("same", len(images))
assert not {"vpt_fast", "timm"} & set(sys.modules)
"""


@pytest.mark.filterwarnings("ignore")
def test_exported_programs_run_without_this_package(tmp_path: Path) -> None:
    paths = []
    cases = {"vit_32px": EXPERTS["code"], "siglip_average": VPTShallow(3)}
    for family, method in cases.items():
        baked = bake(tune(family, method))
        image = families.images(family, batch=5)
        program = torch.export.export(baked, (image[:2],), dynamic_shapes=({0: Dim("batch")},))
        nodes = list(program.graph.nodes)
        assert not any("vpt_fast" in str(node.target) for node in nodes)
        linear = [n.meta["val"].shape for n in nodes if "linear" in str(n.target)]
        rows = [shape[1] for shape in linear if len(shape) == 3]
        assert rows[-1] == (1 if baked.global_pool == "token" else 9)
        parts = [image[:count] for count in (1, 3, 5)]
        expected = [baked(part) for part in parts]
        with torch.inference_mode():
            assert all(
                distance(program.module()(a), b) <= EXACT
                for a, b in zip(parts, expected, strict=True)
            )
        paths.append(tmp_path / f"{family}.pt2")
        torch.export.save(program, paths[-1])
        torch.save((parts, expected), paths[-1].with_suffix(".pt"))
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["same 3"] * len(paths)


def test_it_is_public() -> None:
    assert vpt_fast.bake is vpt_fast.export.bake is bake and "bake" in vpt_fast.__all__
