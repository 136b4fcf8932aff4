"""Which `apex` is installed: NVIDIA's, whose fused kernels megatron-core uses where it finds them, or another project.

NVIDIA's apex is built from source (github.com/NVIDIA/apex). PyPI's package of that name is a toolkit for the Pyramid
web framework. They are told apart by their files; neither is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_prefix.measure import package_version


@dataclass(frozen=True)
class Apex:
    """What `import apex` would find.

    Attributes:
        kind: "none", "nvidia", "nvidia without extensions" or "another project".
        version: of the distribution called apex, where one is installed.
        note: one line for a reader: what it means, and the remedy where there is something to mend.
    """

    kind: str
    version: str | None
    note: str


def find_apex() -> Apex:
    """Look for apex on the import path."""
    spec = find_spec("apex")
    if spec is None:
        return Apex("none", None, "NVIDIA apex is not installed (it is not needed)")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    version = package_version("apex")
    shown = version or "of unknown version"
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return Apex(
            "another project",
            version,
            f"the package `apex` {shown} that is installed is not NVIDIA's: it has no apex.optimizers (PyPI's apex is "
            "a toolkit for the Pyramid web framework). Where `import apex` works, megatron-core's local layers take it "
            "for NVIDIA's and then refuse LayerNorm; remove it with `pip uninstall apex`",
        )
    if find_spec("amp_C") is None:
        return Apex(
            "nvidia without extensions",
            version,
            f"NVIDIA apex {shown} was built without its CUDA extensions (there is no amp_C): megatron-core chooses its "
            "FusedAdam where Transformer Engine is not installed, and FusedAdam then refuses; build apex with its "
            "extensions, or remove it",
        )
    return Apex("nvidia", version, f"NVIDIA apex {shown} with its CUDA extensions")
