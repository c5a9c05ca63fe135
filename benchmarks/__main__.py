"""python -m benchmarks [NAME ...]: run all or some; --page: write docs/benchmarks.md from the results."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from raysd.quiet import quiet_libraries

quiet_libraries()

from benchmarks import (  # noqa: E402
    asha,
    cache,
    damage,
    evaluation,
    gpu,
    memory,
    onnx,
    page,
    peer,
    results,
    saving,
    scheduler,
    service,
    soaks,
    step,
    submission,
    workers,
)
from benchmarks.options import Options, Skipped  # noqa: E402

BENCHMARKS: dict[str, ModuleType] = {
    "step": step,
    "workers": workers,
    "peer": peer,
    "cache": cache,
    "memory": memory,
    "evaluation": evaluation,
    "damage": damage,
    "asha": asha,
    "onnx": onnx,
    "scheduler": scheduler,
    "service": service,
    "saving": saving,
    "submission": submission,
    "gpu": gpu,
}
EXTRA = {"peer": " --peer-script train_text_to_image_lora.py --peer-python PYTHON"}


def main() -> int:
    """0, or 1 if a benchmark failed."""
    arguments = _arguments()
    if arguments.page:
        text = page.render(results.load(arguments.results), _docs(), _commands(), soaks.load(soaks.FOLDER))
        arguments.page.parent.mkdir(exist_ok=True)
        arguments.page.write_text(text)
        print(arguments.page)
        return 0
    return max([_run(name, arguments) for name in arguments.names or BENCHMARKS])


def _run(name: str, arguments: argparse.Namespace) -> int:
    """Run one, print it, write its file; its folder is removed after it."""
    print(f"{name}: {_docs()[name].splitlines()[0]}", flush=True)
    load, began = os.getloadavg(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"benchmarks-{name}-") as work:
        options = Options(Path(work), arguments.quick, arguments.small, arguments.peer_script, arguments.peer_python)
        try:
            result = BENCHMARKS[name].run(options)
        except Skipped as reason:
            print(f"{name}: skipped: {reason}", flush=True)
            return 0
    body = results.document(name, result, time.monotonic() - began, arguments.quick or arguments.small)
    path = results.write({**body, "load_before": [round(value, 2) for value in load]}, arguments.results)
    _show(name, result, path)
    return 0


def _show(name: str, result: results.Result, path: Path) -> None:
    for table in result.tables:
        print(f"  {table.title}")
        for row in [table.columns, *table.rows]:
            print("    " + "  |  ".join(str(cell) for cell in row))
    for target in result.targets:
        print(f"{name}: {'met' if target.met else 'NOT met'}: {target.what}: {target.value:.3f}, bound {target.bound}")
    print(f"{name}: {path}", flush=True)


def _docs() -> dict[str, str]:
    return {name: module.__doc__ or "" for name, module in BENCHMARKS.items()}


def _commands() -> dict[str, str]:
    return {name: f"python -m benchmarks {name}{EXTRA.get(name, '')}" for name in BENCHMARKS}


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all if not given")
    parser.add_argument("--quick", action="store_true", help="the smallest size, to see that it works")
    parser.add_argument("--small", action="store_true", help="gpu: a small size, on the CPU where there is no GPU")
    parser.add_argument("--peer-script", type=lambda word: Path(word).resolve(), help="peer: diffusers' script")
    parser.add_argument("--peer-python", type=lambda word: Path(word).absolute(), help="peer: its interpreter")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the result files")
    parser.add_argument("--page", type=Path, nargs="?", const=page.FILE, help="write the page of all results and end")
    arguments = parser.parse_args(words)
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: not one of {', '.join(BENCHMARKS)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
