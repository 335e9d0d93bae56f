"""Pretraining of Mega language models (arXiv 2209.10655) on clusters; importing it registers them with transformers."""

import atexit
import gc
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_collects = gc.isenabled()
gc.disable()  # what torch and transformers make stays: looking through it, again and again, takes 0.4 s of CPU
try:
    from mega_scale import model
finally:
    if _collects:
        gc.enable()
atexit.register(gc.freeze)  # or the end of a process takes as long again

if TYPE_CHECKING:
    from mega_scale.model import *  # noqa: F403

__all__ = model.__all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(model, name)
