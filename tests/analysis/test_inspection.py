"""Attention shares against an explicit softmax, mixing maps, and files of `vpt-fast inspect`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import distance, pair
from support.formulations.plain_vapt import vapt_pair
from support.pictures import backbone, make_folders, write_checkpoint
from typer.testing import CliRunner

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune, save_adapter
from vpt_fast.analysis.shares import (
    attention_shares,
    mixing_maps,
    query_name,
    uniform_share,
)
from vpt_fast.cli.app import app
from vpt_fast.reports.inspection import image_names

CASES = {
    "shallow": VPTShallow(3),
    "shallow_projected": VPTShallow(3, project_dim=6),
    "deep": VPTDeep(3),
    "shared": VPTDeep(3, shared=True),
    "gaps": VPTDeep(3, blocks=[0, 2]),
    "middle": VPTDeep(3, blocks=[1]),
    "vapt": VAPT(3),
    "vapt_paper": VAPT(3, variant="paper"),
}
FAMILIES = [
    TOKEN,
    "mae",
    "deit_distilled",
    "dinov2_registers",
    "siglip_map",
    "qk_norm",
    "no_bias",
    "average_with_prefix",
    "wide_heads",
]


def plain_shares(plain, image):
    """Return attention (B, H, rows, rows) and the number of prompt rows of each timm block."""
    found = []

    def record(attn, inputs):
        q, k, _ = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        q, k = attn.q_norm(q).transpose(1, 2), attn.k_norm(k).transpose(1, 2)
        weights = (attn.scale * (q @ k.mT)).exp()
        found.append(weights / weights.sum(dim=-1, keepdim=True))

    hooks = [block.attn.register_forward_pre_hook(record) for block in plain.model.blocks]
    counts = [plain.live for _ in plain.sequence(image)]
    for hook in hooks:
        hook.remove()
    return found, counts


@pytest.mark.covering
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_those_of_an_explicit_softmax(family, case):
    method = CASES[case]
    make = vapt_pair if isinstance(method, VAPT) else pair
    tuned, plain = make(families.build(family), method)
    image = families.images(family)
    prefix = tuned.num_prefix_tokens
    expected, counts = plain_shares(plain, image)
    found = attention_shares(tuned, image)
    assert [record.block for record in found] == [i for i, count in enumerate(counts) if count]
    for record in found:
        attention = expected[record.block].detach()
        if family in (TOKEN, "deit_distilled", "dinov2_registers", "qk_norm", "wide_heads"):
            rows = attention[:, :, : 2 if family == "deit_distilled" else 1]
        else:
            rows = attention[:, :, prefix + 3 :]
        right = rows.mean(dim=2)[..., prefix : prefix + 3]
        assert record.prompts.dtype == torch.float64
        assert distance(record.prompts, right) <= 1e-10
        total = record.prompts.sum(-1) + record.tokens
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "method", [VAPT(3, dropout=0.5), VPTDeep(3, dropout=0.5, blocks=[1]), VPTShallow(3, 0.5)]
)
def test_the_model_is_left_as_it_was(method):
    tuned = prompt_tune(families.build(TOKEN), method)
    image = families.images(TOKEN)
    tuned.eval()
    expected, shares = tuned(image), attention_shares(tuned, image)
    tuned.train()
    modes = [module.training for module in tuned.modules()]
    state = torch.get_rng_state()
    seen = []
    handle = tuned.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    for record, other in zip(attention_shares(tuned, image), shares, strict=True):
        assert torch.equal(record.prompts, other.prompts)
        assert not record.prompts.requires_grad
    handle.remove()
    assert [module.training for module in tuned.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tuned.eval()(image), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_and_autocast(dtype):
    tuned, _ = pair(families.build(TOKEN), VPTDeep(3))
    right = attention_shares(tuned, families.images(TOKEN))
    image = families.images(TOKEN).float()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = attention_shares(tuned.float(), image)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for record, other in zip(found, right, strict=True):
        assert record.prompts.dtype == torch.float32
        assert distance(record.prompts, other.prompts) <= tolerance
        total = record.prompts.sum(-1) + record.tokens
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_mixing_maps_map_normalised_patches_to_prompts():
    family = "dinov2_registers"
    tuned, plain = vapt_pair(families.build(family), VAPT(3))
    image = families.images(family)
    maps = mixing_maps(tuned)
    assert sorted(maps) == list(range(1, families.depth(family)))
    inputs = plain.block_outputs(image)
    for index, weights in maps.items():
        assert weights.shape == (3, *tuned.patch_embed.grid_size)
        prompt, x = tuned.blocks[index].prompt, inputs[index - 1]
        y = F.layer_norm(x, x.shape[-1:], prompt.norm.weight, prompt.norm.bias, 1e-5)
        found = weights.flatten(1) @ y[:, tuned.num_prefix_tokens :] + prompt.mix.bias[:, None]
        assert distance(found, plain.token_mixing(index, x)) <= 1e-10
    assert mixing_maps(prompt_tune(families.build(TOKEN), VPTDeep(3))) == {}


def test_untrained_experts_are_alike():
    tuned = prompt_tune(families.build(TOKEN), VAPT(4))
    assert all(not weights.any() for weights in mixing_maps(tuned).values())
    for record in attention_shares(tuned, families.images(TOKEN))[1:]:
        first = record.prompts[..., :1].expand_as(record.prompts)
        torch.testing.assert_close(record.prompts, first)


def test_names_and_uniform_shares():
    patches = 9
    for family, name in {
        TOKEN: "[CLS] query",
        "deit_distilled": "[CLS] and distillation query",
        "siglip_map": "patch queries",
    }.items():
        tuned = prompt_tune(families.build(family), VPTDeep(3))
        assert query_name(tuned) == name
        assert uniform_share(tuned) == 3 / (3 + patches + tuned.num_prefix_tokens)
    paths = [Path(p) for p in ("a/0.png", "b/0.png", "c/0.jpg", "c/0.png", "b/1.png", "B/A.png")]
    names = image_names(paths)
    assert list(names.values()) == ["a_0", "b_0", "c_0", "c_0_2", "1", "A"]
    assert len(next(iter(image_names([Path("x" * 200 + ".png")]).values()))) < 60


def test_wrong_arguments_are_named():
    image = families.images(TOKEN)
    model = families.build(TOKEN)
    with pytest.raises(ValueError, match="VisionTransformer is not tuned and has no prompts"):
        attention_shares(model, image)
    tuned = prompt_tune(model, VPTDeep(3))
    with pytest.raises(TypeError, match="images must be a tensor .* got list"):
        attention_shares(tuned, [image])
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got shape \(3, 24, 24\)"):
        attention_shares(tuned, image[0])
    for method, message in ((LinearProbe(), "linear probe has no"), (VPTDeep(0), "num_prompts is")):
        tuned = prompt_tune(families.build(TOKEN), method)
        for function in (mixing_maps, uniform_share, lambda m: attention_shares(m, image)):
            with pytest.raises(ValueError, match=message):
                function(tuned)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Create a folder with adapters, the weights of their backbone, and images."""
    root = tmp_path_factory.mktemp("inspect")
    write_checkpoint(root / "tiny.pth")
    make_folders(root / "data", test=1)
    methods = {
        "vapt": VAPT(2),
        "deep": VPTDeep(2),
        "shallow": VPTShallow(2),
        "linear": LinearProbe(),
    }
    for name, method in methods.items():
        overlay = {"input_size": [3, 32, 32]}
        save_adapter(
            prompt_tune(backbone(), method),
            root / name,
            model_args={"img_size": 32, "pretrained_cfg_overlay": overlay},
            checkpoint="tiny.pth",
        )
    return root


def call(work, adapter, output, *images):
    arguments = ["inspect", work / adapter, *images, "--output", output]
    arguments += ["--checkpoint", work / "tiny.pth", "--device", "cpu"]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result, code=2):
    """Return the one line on stderr."""
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert line.startswith("vpt-fast: error: ")
    return line


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_inspect_writes_tables_and_pictures(work, tmp_path):
    output = tmp_path / "out"
    images = [work / "data" / "test" / name / "0.png" for name in ("red", "blue")]
    result = call(work, "vapt", output, *images, images[0])
    assert result.exit_code == 0, result.output
    depth, heads = len(backbone().blocks), backbone().blocks[0].attn.num_heads
    attention = rows_of(output / "attention.csv")
    assert list(attention[0]) == ["image", "block", "head", "prompt", "share"]
    assert len(attention) == 2 * depth * heads * 2
    assert {row["image"] for row in attention} == set(map(str, images))
    assert all(0 < float(row["share"]) < 1 for row in attention)
    mixing = rows_of(output / "mixing.csv")
    assert list(mixing[0]) == ["block", "prompt", "row", "column", "weight"]
    assert len(mixing) == (depth - 1) * 2 * 4
    assert {float(row["weight"]) for row in mixing} == {0.0}
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"attention.png"} | {
        name
        for image in ("red_0", "blue_0")
        for name in (
            f"attention_{image}.png",
            f"mixing_{image}_block01.png",  # untrained maps are 0, and drawn once for all blocks
        )
    }
    for name in pictures:
        with Image.open(output / name) as picture:
            assert 600 <= picture.width <= 1400
            assert len(picture.convert("L").getcolors(256)) > 20
    assert "vapt, 2 prompts, 2 images: share of the attention of the [CLS] query" in result.stdout
    table = re.findall(
        r"^\| (\d+) +\| +([\d.]+)% \|.*\| +(static|all zero) \|$", result.stdout, re.M
    )
    assert [int(row[0]) for row in table] == list(range(depth))
    for index, share, _ in table:
        shares = [float(row["share"]) for row in attention if row["block"] == index]
        assert float(share) == pytest.approx(100 * sum(shares) / (2 * heads), abs=0.006)
    assert f"written to {output}: attention.csv, mixing.csv, " in result.stdout

    assert "replace it with --overwrite" in error_of(call(work, "deep", output, images[0]))
    result = call(work, "deep", output, images[0], "--overwrite")
    assert result.exit_code == 0, result.output
    assert {path.name for path in output.iterdir()} == {"attention.csv", "attention.png"}
    assert "vpt-deep, 2 prompts, 1 image" in result.stdout


def test_inspect_continues_after_an_undecodable_image(work, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    good = work / "data" / "test" / "red" / "0.png"
    result = call(work, "shallow", tmp_path / "out", broken, good)
    assert f"{broken} cannot be decoded" in error_of(result, code=1)
    assert {row["image"] for row in rows_of(tmp_path / "out" / "attention.csv")} == {str(good)}
    result = call(work, "shallow", tmp_path / "none", broken, tmp_path / "absent.png")
    message = error_of(result, code=1)
    assert f"{broken} cannot be decoded" in message and "absent.png cannot be decoded" in message
    assert not (tmp_path / "none").exists()


def test_inspect_refuses_wrong_arguments(work, tmp_path):
    good = work / "data" / "test" / "red" / "0.png"
    message = error_of(call(work, "linear", tmp_path / "out", good))
    assert "a linear probe has no prompts to inspect; take an adapter of another method" in message
    assert not (tmp_path / "out").exists()
    assert "not an adapter" in error_of(call(work, "absent", tmp_path / "out", good))
    result = call(work, "deep", tmp_path / "out")
    assert result.exit_code == 2 and "Missing argument 'IMAGE...'" in result.stderr
    for name in ("notes.txt", "attention.csv", "mixing_a_block01.png"):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text("mine")
        message = error_of(call(work, "deep", other, good))
        assert f"{other} exists and is not of an earlier inspect" in message
        assert "choose another --output" in message
        assert (other / name).read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file; choose another --output" in error_of(call(work, "deep", file, good))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert call(work, "deep", empty, good).exit_code == 0
    (empty / "notes.txt").write_text("mine")
    assert "(it holds notes.txt)" in error_of(call(work, "deep", empty, good, "--overwrite"))
