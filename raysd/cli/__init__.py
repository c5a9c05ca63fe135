"""The command `raysd`: one function a verb, which reads a spec and calls the library."""

import gc
import sys
import traceback
from pathlib import Path

import typer
from typer.exceptions import TyperException

from raysd.cli import data, evaluate, feedback, jobs, keys, models, plan, predictions, serve, study, train, tune
from raysd.cli.output import RESULT
from raysd.console import errors
from raysd.errors import RaysdError
from raysd.jobs.outcome import note
from raysd.quiet import import_quickly, native_logs, quiet_libraries

INTERRUPTED = 130
"""What Typer makes of a KeyboardInterrupt in a verb, instead of letting it through."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for verbs in (train.app, plan.app, tune.app, evaluate.app, models.app, serve.app, jobs.app):
    app.add_typer(verbs)
app.add_typer(data.app, name="data")
app.add_typer(train.runs_app, name="runs")
app.add_typer(models.models_app, name="models")
app.add_typer(study.study_app, name="study")
app.add_typer(feedback.feedback_app, name="feedback")
app.add_typer(keys.keys_app, name="keys")
app.add_typer(predictions.predictions_app, name="predictions")
app.add_typer(jobs.jobs_app, name="jobs")


def main() -> None:
    """Run a command. Exit status: 0 done, 1 failed, 2 the request was wrong."""
    quiet_libraries()
    import_quickly()
    with native_logs() as log:
        status = _run(log)
        _leave_ray()
        if status == 1 and log.stat().st_size:
            errors.print(f"details: {log}", soft_wrap=True)
        else:
            log.unlink()
    gc.freeze()  # else the interpreter walks all that was imported before it ends: two seconds
    sys.exit(status)


def _leave_ray() -> None:
    """Now, while there are streams to print on what its processes said last: at exit they are closed, and Ray would crash."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    sys.stdout = RESULT


def _run(log: Path) -> int:
    """The command's exit status. An error's traceback goes to `log`."""
    try:
        status = app(prog_name="raysd", standalone_mode=False)
        return _stopped() if status == INTERRUPTED else status if isinstance(status, int) else 0
    except SystemExit as end:  # of Ray too, which makes one of a signal with its number
        return end.code if end.code in (0, 1, 2) else int(end.code is not None)
    except TyperException as error:
        return _misspelt(error)
    except RaysdError as error:
        note(error)
        errors.print(str(error), style="red", soft_wrap=True)
        return error.exit_status
    except KeyboardInterrupt:
        return _stopped()
    except Exception as error:
        note(error)
        with log.open("a") as file:
            file.write(traceback.format_exc())
        reason = (str(error).splitlines() or [""])[0][:300]
        errors.print(f"{type(error).__name__}: {reason}", style="red", soft_wrap=True)
        return 1


def _stopped() -> int:
    errors.print("stopped")
    return 1


def _misspelt(error: TyperException) -> int:
    """A verb or an option that is not there, in two lines as every wrong request."""
    context = getattr(error, "ctx", None)
    errors.print(error.format_message(), style="red", soft_wrap=True)
    if context is not None:
        errors.print(f"help: {context.command_path} --help", soft_wrap=True)
    return 2
