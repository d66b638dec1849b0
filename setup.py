"""Packaging; tool settings are in pyproject.toml.

`kernels/` installs as `vpt_fast.kernels`: `vpt_fast/kernels` is a link to it, which Python, pip,
mypy and import-linter all follow without any code of ours.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

# What the command `vpt-fast` and its training need. Every extra with a command holds these too, so
# that it is enough by itself.
TRAIN = [
    "pillow>=10.1",
    "tensorboard>=2.16",
    "torchvision>=0.23",
    "tqdm>=4.66",
    "typer>=0.12.4",
]
# Of `inspect`, `memory`, `report` and the demo.
REPORTS = [
    *TRAIN,
    "jinja2>=3.1",
    "matplotlib>=3.8",
    "scikit-learn>=1.4",
]
# Of the formats webdataset, imagefolder, parquet and hf.
DATA = [
    *TRAIN,
    "datasets>=4",
]
# Of `sweep`, its picture and its preset's data.
SWEEP = [
    *TRAIN,
    "matplotlib>=3.8",
    "optuna>=4",
    "scikit-learn>=1.4",
]
# Of examples/serve; they need Python 3.11.
SERVE = [
    *TRAIN,
    "fastapi>=0.165",
    "fastapi-offline>=1.7",
    "prometheus-client>=0.21",
    "python-multipart>=0.0.20",
    "uvicorn>=0.54",
]
DOCS = [
    "mkdocs-material>=9",
    "mkdocstrings[python]>=1",
]
# Of docs/integrations.
INTEGRATIONS = [
    "accelerate>=1.15",
    "lightning>=2.6",
    "onnx>=1.23",
    "onnxruntime>=1.32",
    "onnxscript>=0.7",
    "peft>=0.21",
    "torchao>=0.18",
    "transformers>=5.24",
]
DEV = [
    *DATA,
    *REPORTS,
    *SWEEP,
    *SERVE,
    *DOCS,
    *INTEGRATIONS,
    "build>=1",
    "httpx2>=2.16",
    "import-linter>=2.5",
    "mypy>=1.10",
    "playwright>=1.49",
    # From 9.2 on, pytest-xdist 3.8 no longer groups tests (pytest-dev/pytest-xdist#1386).
    "pytest>=8,<9.2",
    "pytest-benchmark>=4",
    "pytest-xdist>=3.7",
    "ruff>=0.6",
    # Wheels are built in tests, without a network.
    "setuptools>=77",
    "types-tqdm",
]

# Metadata that an index shows. There is no address of a repository or a site yet.
ABOUT = {
    "author": "The vpt_fast authors",
    "license_expression": "Apache-2.0",
    "license_files": ["LICENSE"],
    "keywords": ["visual prompt tuning", "parameter-efficient fine-tuning", "vision transformer",
                 "timm", "PyTorch", "Triton"],
    "project_urls": {
        "VPT (paper)": "https://arxiv.org/abs/2203.12119",
        "VAPT (paper)": "https://arxiv.org/abs/2501.18936",
    },
    "classifiers": [
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
}  # fmt: skip

setup(
    name="vpt-fast",
    # Of a file, as importing the package would need PyTorch.
    version=runpy.run_path("vpt_fast/version.py")["__version__"],
    description="Visual prompt tuning of timm vision transformers with Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    **ABOUT,
    python_requires=">=3.10",
    packages=find_packages(include=["vpt_fast", "vpt_fast.*"]),
    package_data={"vpt_fast": ["py.typed", "assets/*"]},
    # The lowest Python, torch, Triton, torchvision and timm are those of a row of
    # bench/matrix/rows.py, which ran: docs/versions.md.
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "timm>=1.0.29,<1.1",
        "numpy>=1.26",
        "safetensors>=0.4",
    ],
    extras_require={
        "train": TRAIN,
        "data": DATA,
        "reports": REPORTS,
        "sweep": SWEEP,
        "serve": SERVE,
        "docs": DOCS,
        "dev": list(dict.fromkeys(DEV)),
    },
    entry_points={"console_scripts": ["vpt-fast = vpt_fast.__main__:main"]},
)
