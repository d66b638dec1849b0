"""What people type: values in other spellings, flags of other programs, one line for the rest."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli import MODEL, call, error_of, train

from vpt_fast.cli.usage import spellings
from vpt_fast.cli.usage.spellings import FLAGS, REFUSED, each, respelled, spelling
from vpt_fast.methods import NAMES, method_names
from vpt_fast.train.common.names import AMP_DTYPES, FORMATS
from vpt_fast.train.common.recipe import resolve_amp_dtype


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("vpt_deep", "vpt-deep"),
        ("VPTDeep", "vpt-deep"),
        ("VPT-Deep", "vpt-deep"),
        ("deep", "vpt-deep"),
        ("Shallow", "vpt-shallow"),
        ("linear_probe", "linear"),
        ("LinearProbe", "linear"),
        ("GateVPT", "gate-vpt"),
        ("BitFit", "bias"),
        ("mlp_head", "mlp-head"),
        ("lora", "lora"),
        ("my.module:Class", "my.module:Class"),
    ],
)
def test_methods(typed: str, meant: str) -> None:
    assert spelling(method_names, spellings.METHODS)(typed) == meant
    assert each(spelling(method_names, spellings.METHODS))(f"{typed}, VAPT") == f"{meant},vapt"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("BF16", "bfloat16"), ("half", "float16"), ("FP16", "float16"), ("fp32", "float32"),
     ("Float16", "float16"), ("int8", "int8")],
)  # fmt: skip
def test_dtypes(typed: str, meant: str) -> None:
    assert spelling(AMP_DTYPES, spellings.DTYPES)(typed) == meant


def test_other_values() -> None:
    formats = spelling(FORMATS, spellings.FORMATS)
    typed = ("VTAB_1k", "Folder", "ImageFolder", "wds", "CSV", "coco")
    assert [formats(name) for name in typed] == [
        "vtab", "folders", "imagefolder", "webdataset", "csv", "coco",
    ]  # fmt: skip
    assert spelling(("a-b", "A_B"))("A_B") == "A_B"  # a name that is typed as it is
    assert [spellings.device(name) for name in ("GPU", "gpu:1", "CUDA:0", "Auto", "tpu")] == [
        "cuda", "cuda:1", "cuda:0", "auto", "tpu",
    ]  # fmt: skip
    assert spellings.model("ViT-Base-Patch16-224.Orig_in21k") == "vit_base_patch16_224.orig_in21k"
    assert spellings.model("timm/test_vit") == "test_vit"
    assert spellings.model("hf-hub:timm/X-Y") == "hf-hub:timm/X-Y"


def test_synonyms_mean_names_that_there_are() -> None:
    assert set(spellings.METHODS.values()) <= set(NAMES)
    assert set(spellings.DTYPES.values()) <= set(AMP_DTYPES)
    assert set(spellings.FORMATS.values()) <= set(FORMATS)
    assert not FLAGS.keys() & REFUSED.keys()


def test_sixteen_bits_are_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, has_it = torch.device("cuda"), [True]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_it[0])
    assert resolve_amp_dtype("16-bit", cuda) == "bfloat16"
    has_it[0] = False
    assert resolve_amp_dtype("16-bit", cuda) == "float16"
    assert resolve_amp_dtype("16-bit", torch.device("cpu")) == "bfloat16"


def test_flags_of_other_programs() -> None:
    own = {"--amp-dtype", "--weight-decay", "--num-prompts", "--lr", "-b", "--prefix-cache"}
    words = ["--wd=0.1", "--num_virtual_tokens", "5", "--lr_base", "1", "-b", "8", "--other_one"]
    assert respelled(words, own) == [
        "--weight-decay=0.1", "--num-prompts", "5", "--lr", "1", "-b", "8", "--other_one",
    ]  # fmt: skip
    # What is given by itself wins, before `--amp` or after it, and paths stay as they are.
    assert respelled(["--amp-dtype", "float16", "--amp", "my_data"], own) == [
        "--amp-dtype=16-bit", "--amp-dtype", "float16", "my_data",
    ]  # fmt: skip
    assert respelled(["--", "--amp", "--wd"], own) == ["--", "--amp", "--wd"]
    assert respelled(["--amp"], {"--lr"}) == ["--amp"]
    with pytest.raises(ValueError, match="^--num_classes is not an option: the data say how many"):
        respelled(["--num_classes=7"], own)


def test_a_run_with_spellings_of_others(folder, checkpoint, tmp_path) -> None:
    output = tmp_path / "run"
    words = ["--method", "VPTDeep", "--num_virtual_tokens", 2, "--opt", "SGD", "--wd", 0.5]
    words += ["--label_smoothing", 0.1, "--mixup-alpha", 0.2, "--mixup_mode", "ELEM"]
    words += ["--class_order", "Natural", "--format", "Folder", "--epochs", 1]
    result = train(folder, checkpoint, output, *words, "--model", "test-vit", "--amp")
    assert result.exit_code == 0, result.output
    record = json.loads((output / "run.json").read_text())
    assert record["method"]["name"] == "vpt-deep" and record["method"]["num_prompts"] == 2
    assert record["model"]["name"] == "test_vit"
    recipe = record["recipe"]
    assert (recipe["opt"], recipe["weight_decay"]) == ("sgd", 0.5)
    assert (recipe["smoothing"], recipe["mixup"], recipe["mixup_mode"]) == (0.1, 0.2, "elem")
    assert record["data"]["format"] == "folders" and record["data"]["class_order"] == "natural"
    if record["options"]["device"] == "cpu":
        assert recipe["amp_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-classes", "5"], "--num-classes is not an option: the data say how many classes"),
        (["--data_dir", "x"], "--data_dir is not an option: the data are an argument"),
        (["--no-prefetcher"], "--workers is how many processes load images"),
        (["--learning-rate", "1"], "--lr is the base rate"),
        (["--gradient_checkpointing"], "--memory minimal"),
    ],
)
def test_flags_without_a_counterpart_are_one_line(folder, words, message) -> None:
    assert message in error_of(call("train", folder, *MODEL, *words))


def test_unknown_options_name_near_ones(folder) -> None:
    result = call("train", folder, "--epoch", 3)
    assert result.exit_code == 2 and "No such option: --epoch" in result.stderr
    assert "--epochs" in result.stderr
