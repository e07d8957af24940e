"""Pretrain vision backbones with DINO, on images in object storage, on a Ray cluster.

In a notebook:

    import dinoray

    run = dinoray.pretrain("data.path=photos", "name=first")          # the run directory
    dinoray.read_metrics(run)                                         # a pandas DataFrame
    model, transform = dinoray.load_teacher(run)                      # a timm model and its transform
    features = dinoray.embed(run, ["a.jpg", "b.jpg"])                 # float32 [2, D]

The commands are `dinoray pretrain` and so on; `dinoray --help` lists them.
"""

from pathlib import Path
from typing import Any

__all__ = ["embed", "load_teacher", "pretrain", "read_metrics"]

_beside = Path(__file__).resolve().parents[1]
if (_beside / "pipeline").is_dir() and (_beside / "pyproject.toml").is_file():
    # In a checkout, and so in the code that a job uploads, models/, pipeline/ and jobs/ lie beside this folder.
    # An installed package has them in it.
    __path__.append(str(_beside))


def __getattr__(name: str) -> Any:
    """Import what a notebook uses at its first use: the commands import this package too."""
    if name in __all__:
        from dinoray import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
