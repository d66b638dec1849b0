"""Names that can be chosen, and defaults that the help shows; nothing here imports PyTorch."""

from __future__ import annotations

# timm's name for each: its "sgd" uses Nesterov momentum, the papers' does not.
OPTIMIZERS = {"sgd": "momentum", "adamw": "adamw", "adam": "adam"}
DEFAULT_LR = {"sgd": 2.5, "adamw": 1e-3, "adam": 1e-3}
SGD_LR_WITHOUT_WARMUP = 0.5
"""2.5 is the papers' after ten epochs of warm-up. Without, VPT-Deep's loss rises at first: of the
demo's model on 500 digits it went 9.6, 16.6, 6.5 in three epochs, and 5.0, 2.1, 1.6 with 0.5."""
SCHEDULES = ("epoch", "step")
MIXUP_MODES = ("batch", "pair", "elem")
BALANCED = "balanced"

AMP_DTYPES = ("float32", "bfloat16", "float16")
"""Names of the dtypes of torch.autocast, weights and images."""
AUTO, SIXTEEN_BIT = "auto", "16-bit"
"""Names of dtypes that depend on the device: `recipe.resolve_amp_dtype`."""

FORMATS = (
    *("auto", "folders", "classes", "csv", "vtab", "vtab-1000", "fgvc"),
    *("hf", "webdataset", "imagefolder", "parquet"),
)
"""folders has train/, classes has none; vtab trains on train800.txt with val200.txt, vtab-1000 on
both without validation."""
SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
"""Folder names that are looked for, in this order, for each split."""
CLASS_ORDERS = ("strings", "natural")
"""strings: class10 before class2, as torchvision sorts folders; natural: class2 before class10."""
CACHES = ("auto", "memory", "stream")
"""Where decoded training and validation images live: auto caches up to 1 GiB of each split."""

INTERPOLATIONS = ("model", "bilinear", "bicubic", "nearest")
NORMALISATIONS = ("model", "imagenet", "inception", "none")
RESIZES = ("model", "squash", "crop")
CROPS = ("scaled", "plain")
"""scaled: a random part of the area, resized (timm's); plain: a crop of the model's size from the
image as it is resized for evaluation (the papers' runs on FGVC)."""
