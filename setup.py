"""Packaging; tool settings are in pyproject.toml.

`kernels/` installs as `vpt_fast.kernels`: `vpt_fast/kernels` is a link to it, which Python, pip,
mypy and import-linter all follow without any code of ours.
"""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = [
    "fastapi>=0.165",
    "prometheus-client>=0.21",
    "python-multipart>=0.0.20",
    "uvicorn>=0.54",
]

setup(
    name="vpt-fast",
    version="0.1.0",
    description="Visual prompt tuning of timm vision transformers with Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vpt_fast", "vpt_fast.*"]),
    package_data={"vpt_fast": ["py.typed", "assets/*"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "triton>=3.2; platform_system == 'Linux'",
        "timm>=1.0.29,<1.1",
        "numpy>=1.26",
        "safetensors>=0.4",
        "pillow>=10.1",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "jinja2>=3.1",
        "tensorboard>=2.16",
        "optuna>=4",
        "tqdm>=4.66",
        "typer>=0.12",
    ],
    extras_require={
        # Of examples/serve; they need Python 3.11.
        "serve": SERVE,
        "dev": [
            *SERVE,
            "httpx2>=2.16",
            "mypy>=1.10",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.7",
            "ruff>=0.6",
            "types-tqdm",
            "websockets>=14",
        ],
    },
    entry_points={"console_scripts": ["vpt-fast = vpt_fast.cli.app:main"]},
)
