"""Keeps libraries out of a user's way: their logs and bars, though not their errors, and the time that importing them takes."""

import gc
import importlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ENVIRONMENT = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # else Ray Tune draws tables whatever its verbosity
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

LEFT_OUT = ("bitsandbytes", "mlflow")
"""Packages that diffusers and DeepSpeed import, and we only where a spec asks for them."""

LOOKING = ("accelerate", "deepspeed", "diffusers", "peft", "transformers")
"""Packages that look for those once, when they are imported."""


def quiet_libraries() -> None:
    """Set before the libraries are imported; processes started from here inherit it. What the user set stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    # It warns of kernels that it would download, whether or not a run uses it: transformers imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def import_quickly() -> None:
    """For a process that imports torch, diffusers and DeepSpeed: without this it takes half as long again.

    Python looks for circular garbage rarely: what modules make stays, and would be looked at again and again. Tensors are
    freed by their count, at once, as ever. And packages that those libraries would load where they are installed, seconds
    of it, cannot be found until `bring_in`.
    """
    gc.set_threshold(100_000, 20, 50)
    if any(name in sys.modules for name in LOOKING):  # they have looked already, and would miss what they found
        return
    for name in LEFT_OUT:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def bring_in(name: str) -> ModuleType:
    """Import a package that `import_quickly` may have left out. Raises ImportError."""
    if sys.modules.get(name, sys) is None:
        del sys.modules[name]
    return importlib.import_module(name)


@contextmanager
def native_logs() -> Iterator[Path]:
    """What compiled libraries and Ray's processes write on standard error goes to the file yielded.

    Python's own standard error stays where it was. The caller keeps or removes the file.
    """
    handle, name = tempfile.mkstemp(prefix="raysd-log-", suffix=".txt")
    outside, before = os.dup(2), sys.stderr
    sys.stderr = os.fdopen(outside, "w", buffering=1)
    os.dup2(handle, 2)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        sys.stderr.flush()
        os.dup2(outside, 2)
        sys.stderr.close()
        sys.stderr = before
