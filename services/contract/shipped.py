"""Sweep files that come with the platform."""

from pathlib import Path

import services


def shipped_sweep(name: str) -> Path:
    """A ready-made sweep: beside the packages in a checkout, inside ``services`` in an installed wheel."""
    package = Path(services.__path__[0])
    for folder in (package.parent / "sweeps", package / "sweeps"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"the installation lacks {name}")
