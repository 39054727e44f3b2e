"""Whether the installed torchtitan is one that this package knows, and what to say when it is not.

Found by looking at its files: nothing of it is imported.
"""

from __future__ import annotations

from torchtitan_tp_validate.locate import KNOWN_RELEASES, package_folder, torchtitan_version

_OF_0_1 = "config_manager.py"
"""Up to 0.1.0 the job was parsed by this module, and a model registered itself as it was imported."""

_DISTRIBUTIONS = {"fla": "flash-linear-attention", "PIL": "pillow", "yaml": "pyyaml"}
"""What torchtitan imports -> who brings it, where that has another name."""


def unsupported_torchtitan() -> str | None:
    """Return why nothing can be said about the installed torchtitan, or None when there is no such reason."""
    folder = package_folder("torchtitan")
    if folder is None or not (folder / _OF_0_1).is_file():
        return None
    return (
        f"torchtitan {torchtitan_version() or 'of unknown version'} is not supported: it keeps its models "
        f"and its configuration elsewhere, so nothing was validated; supported are {min(KNOWN_RELEASES)} to "
        f"{max(KNOWN_RELEASES)}."
    )


def missing_import(error: ImportError) -> str:
    """Return what to say of an import of torchtitan that failed: what is not installed, and how to get it."""
    name = error.name or ""
    if name == "torchtitan":
        return "torchtitan is not installed: pip install torchtitan."
    missing = name.partition(".")[0]
    if missing in ("", "torchtitan") or not isinstance(error, ModuleNotFoundError):
        return f"torchtitan is installed, but cannot be imported: {error}."
    return f"torchtitan is installed, but {missing}, which it imports, is not: {how_to_get(missing)}."


def how_to_get(module: str) -> str:
    """Return the command that brings what torchtitan imports under this name."""
    top = module.partition(".")[0]
    return f"pip install {_DISTRIBUTIONS.get(top, top)}"
