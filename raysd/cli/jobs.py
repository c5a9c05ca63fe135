"""`raysd submit` and `raysd jobs`: commands on somebody else's cluster."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from raysd.cli.output import RESULT, Json, show, table, when
from raysd.cli.submitted import command_of
from raysd.console import errors
from raysd.errors import RequestError
from raysd.jobs import clusters, command, environment, package
from raysd.jobs.clusters import EntrySpec

app = typer.Typer()
jobs_app = typer.Typer(no_args_is_help=True, help="Jobs on a cluster.")
OnCluster = Annotated[
    str | None, typer.Option("--cluster", help="URL of a dashboard, or a name in clusters.toml. [env: RAYSD_CLUSTER]")
]


@app.command()
def submit(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND …", help="Any command of raysd.")],
    cluster: OnCluster = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log and end with its exit status.")] = False,
    send: Annotated[
        bool, typer.Option("--send", help="Send this folder along; else the cluster's raysd runs.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Even if the same job has succeeded.")] = False,
    retries: Annotated[int, typer.Option(min=0, max=100, help="How often a command that died is started again.")] = 3,
    entry_cpus: Annotated[float | None, typer.Option(min=0, help="CPUs that the command's own process takes.")] = None,
    entry_resource: Annotated[list[str] | None, typer.Option(help="NAME=AMOUNT that its node must have.")] = None,
    entry_label: Annotated[list[str] | None, typer.Option(help="LABEL=VALUE that its node must have.")] = None,
    as_json: Json = False,
) -> None:
    """Run a command on a cluster: `raysd submit --cluster http://HOST:8265 --follow -- train lora-demo`."""
    where = clusters.find(cluster)
    entry = _entry(where.spec.entry, entry_cpus, entry_resource, entry_label)
    found = command_of(context.find_root().command, words)
    command.refuse_secrets(found)
    command.refuse_outputs(found)
    storage = environment.storage_for(where)
    sent = package.select(Path.cwd()) if send else None
    notices = command.check_inputs(found, where, sent)
    named, base = command.name(found, storage, sent)
    values, kept = environment.values_for(os.environ)
    if kept:
        notices.append(f"not sent, they look like secrets: {', '.join(kept)}; set them in the cluster's environment")
    for line in [*notices, *(sent.lines() if sent else [])]:
        errors.print(line, markup=False, soft_wrap=True)

    from raysd.jobs.submit import Submission
    from raysd.jobs.submit import submit as send_job

    client = _client(where)
    done = send_job(client, Submission(base, named, storage, values, sent, retries, entry), again)
    body = {"id": done.id, "new": done.new, "command": str(named), "run": named.run, "search": named.search}
    body |= {"cluster": where.url, "storage": storage}
    _said(done, named)
    if follow:
        _to_end(client, done.id, cluster, as_json, body)
        return
    show(body, as_json, lambda: f"follow it: {_logs(done.id, cluster)}")


@jobs_app.command("list")
def jobs_list(cluster: OnCluster = None, as_json: Json = False) -> None:
    """Jobs that raysd submitted to a cluster, oldest first."""
    rows = [_row(job) for job in _client(clusters.find(cluster)).ours()]
    show(rows, as_json, lambda: table(rows, "id", "status", "started", "command"))


@jobs_app.command("logs")
def jobs_logs(
    id: str,
    cluster: OnCluster = None,
    follow: Annotated[bool, typer.Option("--follow", help="Until it ends, and end with its exit status.")] = False,
    as_json: Json = False,
) -> None:
    """The log of a job."""
    client = _client(clusters.find(cluster))
    if follow:
        _to_end(client, id, cluster, as_json, {"id": id})
        return
    client.details(id)
    text = client.get_job_logs(id)
    if as_json:
        show({"id": id, "log": text}, True, str)
    else:
        RESULT.write(text)


@jobs_app.command("wait")
def jobs_wait(id: str, cluster: OnCluster = None, as_json: Json = False) -> None:
    """Wait until a job ends, and end with its exit status."""
    _to_end(_client(clusters.find(cluster)), id, cluster, as_json, {"id": id}, log=False)


@jobs_app.command("stop")
def jobs_stop(
    id: str,
    cluster: OnCluster = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds that the command may take to end.")] = 600.0,
    now: Annotated[bool, typer.Option("--now", help="Do not ask it first: work since its checkpoint is lost.")] = False,
    as_json: Json = False,
) -> None:
    """Let a job write its checkpoint and end. The same `raysd submit` goes on from there."""
    from raysd.jobs.stop import stop

    client = _client(clusters.find(cluster))
    job = stop(client, id, wait, now, _say)
    show(_row(job), as_json, lambda: f"job {id}: {job.status.value.lower()}")


def _entry(entry: EntrySpec, cpus: float | None, resources: list[str] | None, labels: list[str] | None) -> EntrySpec:
    """The cluster's own settings with those of this command over them."""
    from raysd.config import load

    changes: dict[str, Any] = entry.model_dump()
    if cpus is not None:
        changes["cpus"] = cpus
    if resources:
        changes["resources"] = {name: _number(name, text) for name, text in map(_pair, resources)}
    if labels:
        changes["labels"] = dict(map(_pair, labels))
    return load(EntrySpec, changes, "entry")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise RequestError(f"{text}: expected NAME=VALUE")
    return name, value


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RequestError(f"--entry-resource {name}={text}: expected a number") from None


def _client(where: clusters.Cluster) -> Any:
    from raysd.jobs.client import Client

    return Client(where)


def _said(done: Any, named: command.Command) -> None:
    thing = f", run {named.run}" if named.run else f", search {named.search}" if named.search else ""
    if not done.new:
        more = " It has succeeded; to run it once more: --again" if done.done else ""
        _say(f"job {done.id} is this submission already; nothing new was submitted.{more}")
    elif done.attempt > 1:
        _say(f"submitted job {done.id}{thing}: attempt {done.attempt}, which goes on where the last one ended")
    else:
        _say(f"submitted job {done.id}{thing}")


def _logs(id: str, cluster: str | None) -> str:
    """The command that follows a job; a cluster that the environment names is found again."""
    return shlex.join(["raysd", "jobs", "logs", id, "--follow", *(["--cluster", cluster] if cluster else [])])


def _to_end(client: Any, id: str, cluster: str | None, as_json: bool, body: dict[str, Any], log: bool = True) -> None:
    """Follow a job, or wait for it; end as it does. Ctrl-C leaves it alone."""
    from raysd.jobs.client import exit_status
    from raysd.jobs.follow import reason, to_end

    try:
        job = to_end(client, id, (_write_aside if as_json else _write) if log else None, _say)
    except KeyboardInterrupt:
        _say(f"detached; the job goes on. Come back: {_logs(id, cluster)}")
        raise typer.Exit(1) from None
    if as_json:
        show({**body, **_row(job)}, True, str)
    status = exit_status(job)
    if status:
        _say(f"job {job.submission_id} {job.status.value.lower()}: {reason(job)}")
        raise typer.Exit(status)


def _row(job: Any) -> dict[str, Any]:
    from raysd.jobs.client import about

    known = about(job)
    return {
        "id": job.submission_id,
        "status": job.status.value.lower(),
        "exit_status": job.driver_exit_code,
        "started": when(job.start_time / 1000) if job.start_time else None,
        "ended": when(job.end_time / 1000) if job.end_time else None,
        "run": known.get("run"),
        "search": known.get("search"),
        "command": f"raysd {known['command']}" if "command" in known else job.entrypoint,
    }


def _write(text: str) -> None:
    RESULT.write(text)
    RESULT.flush()


def _write_aside(text: str) -> None:
    sys.stderr.write(text)


def _say(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)
