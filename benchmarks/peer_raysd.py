"""The command `raysd`, noting when each of its events was seen: python -m benchmarks.peer_raysd OUT train FILE.toml ..."""

import json
import sys
import time
from typing import Any

from raysd import cli, console


def main() -> None:
    out = sys.argv.pop(1)
    plain = console.Watcher.__call__
    with open(out, "w") as file:

        def noted(self: console.Watcher, event: dict[str, Any]) -> None:
            said = {name: event[name] for name in ("kind", "text", "step", "time", "done") if name in event}
            file.write(json.dumps({**said, "seen": time.time()}) + "\n")
            plain(self, event)

        console.Watcher.__call__ = noted  # type: ignore[method-assign]
        cli.main()


if __name__ == "__main__":
    main()
