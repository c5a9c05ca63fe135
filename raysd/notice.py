"""Tells Ray that a spot machine is about to be taken away: python -m raysd.notice aws|gcp, beside Ray on each such machine.

EC2 says so two minutes before (instance metadata, spot/instance-action), Compute Engine half a minute before
(instance/preempted). Ray drains the node: no new work lands on it, and training runs there write a checkpoint.
On Kubernetes nobody needs this: a pod's SIGTERM reaches `ray start --block`, which drains its node itself.
"""

import http.client
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

AWS, GCP = "http://169.254.169.254", "http://metadata.google.internal"
PERIOD = 2.0
"""Seconds between two looks."""
GCP_SECONDS = 30
PATIENCE = 2.0
UNREADABLE = (OSError, ValueError, TypeError, KeyError, http.client.HTTPException)
"""What looking raises where the metadata service is away, or answers what is no notice."""


def main(words: list[str]) -> int:
    """Watch until the notice has come. 2 for a cloud that is not known."""
    clouds: dict[str, Callable[[], int | None]] = {"aws": aws, "gcp": gcp}
    if len(words) != 1 or words[0] not in clouds:
        print("python -m raysd.notice aws|gcp", file=sys.stderr)
        return 2
    watch(clouds[words[0]], drain)
    return 0


def watch(look: Callable[[], int | None], drain: Callable[[int], None], period: float = PERIOD) -> None:
    """Drain this node once `look` gives the seconds that it has left. A drain that fails is tried again for so long."""
    end = time.monotonic() + _left(look, period)
    while True:
        try:
            return drain(max(0, round(end - time.monotonic())))
        except (OSError, subprocess.SubprocessError) as error:
            print(f"raysd: not drained: {error}", file=sys.stderr, flush=True)
        if time.monotonic() >= end:
            return
        time.sleep(period)


def _left(look: Callable[[], int | None], period: float) -> int:
    """Wait for the notice. A metadata service that is away, or answers nonsense, is asked again: nobody starts this anew."""
    said = ""
    while True:
        try:
            left = look()
        except UNREADABLE as error:
            reason = f"{type(error).__name__}: {error}".strip()
            if reason != said:  # else a line every other second
                print(f"raysd: no notice could be read: {reason}", file=sys.stderr, flush=True)
            said = reason
        else:
            if left is not None:
                return left
        time.sleep(period)


def aws(root: str = AWS) -> int | None:
    """Seconds until EC2 takes this machine away, None where no notice was given. Raises OSError."""
    token = _get(f"{root}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        body = json.loads(_get(f"{root}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    at = datetime.strptime(body["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return max(0, int((at - datetime.now(UTC)).total_seconds()))


def gcp(root: str = GCP) -> int | None:
    """The same of Compute Engine."""
    said = _get(f"{root}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_SECONDS if said.strip() == "TRUE" else None


def drain(seconds: int) -> None:
    """Have the cluster's head drain this node, which will be gone in so many seconds. Raises CalledProcessError."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the machine is taken away"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(max(1, seconds))], check=True)


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return str(answer.read(65536).decode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
