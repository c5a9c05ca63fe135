"""What is known of a command before it is submitted: its options are parsed and its spec is checked here, at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raysd.cli.specs import dotted, recipe_of, search_of
from raysd.config import TrainingSpec, override
from raysd.errors import RequestError
from raysd.jobs.command import Command, Named

NOT_JOBS = ("submit", "jobs")
OUTPUTS = ("--out", "--html")
PATHS = ("data", "source", "prompts", "inception", "clip")
"""Options and arguments that are text and may name a local file or folder."""
FILES = (".toml", ".yaml", ".yml", ".jsonl", ".zip", ".safetensors")


def command_of(root: Any, words: Sequence[str]) -> Command:
    """Parse a command of `root`, raysd's own, without running it.

    Raises RequestError, SpecError, and typer's own error for a wrong option.
    """
    if not words or words[0] in NOT_JOBS:
        raise RequestError("raysd submit -- COMMAND …: a command of raysd, such as train lora-demo")
    context = _parsed(root, words)
    given = list(_paths(context))
    outputs = tuple(named for named in given if named.option in OUTPUTS)
    inputs = tuple(named for named in given if named.option not in OUTPUTS)
    values = context.params
    plain = Command(tuple(words), label=words[0], inputs=inputs, outputs=outputs)
    if words[0] == "train" and values.get("recipe"):
        return _train(plain, values, context.args)
    if words[0] == "tune":
        return _tune(plain, values, context.args)
    if list(words[:2]) == ["runs", "resume"]:
        return Command(plain.words, values["name"], run=values["name"])
    return plain


def _train(plain: Command, values: dict[str, Any], rest: list[str]) -> Command:
    recipe, name = values["recipe"], values["name"]
    inputs = _recipe(recipe)
    if _readable(recipe):
        inputs += _training(override(recipe_of(recipe), dotted(rest)))
    label = name or Path(recipe).stem
    return Command(plain.words, label, run=name, unnamed=name is None, inputs=(*plain.inputs, *inputs))


def _tune(plain: Command, values: dict[str, Any], rest: list[str]) -> Command:
    what, name = values["what"], values["name"]
    if what in ("status", "resume", "report"):
        search = rest[0] if len(rest) == 1 else None
        return Command(
            plain.words, search or "tune", search=search if what == "resume" else None, outputs=plain.outputs
        )
    inputs: tuple[Named, ...] = (Named("the search", what, file=True),)
    if _readable(what):
        spec, training = search_of(what, rest)
        inputs += _recipe(spec.recipe)
        if _readable(spec.recipe):
            inputs += _training(override(recipe_of(spec.recipe), training))
    label = name or Path(what).stem
    return Command(plain.words, label, search=name, unnamed=name is None, inputs=(*plain.inputs, *inputs))


def _parsed(root: Any, words: Sequence[str]) -> Any:
    """The context of the innermost command, with its values; nothing is run."""
    command, rest = root, list(words)
    context = command.context_class(command, info_name="raysd")
    while hasattr(command, "commands"):
        name = rest.pop(0) if rest else ""
        if name not in command.commands:
            known = ", ".join(sorted(set(command.commands) - set(NOT_JOBS)))
            raise RequestError(f"raysd {' '.join(words[:2])}: no such command; one of {known}")
        command = command.commands[name]
        if hasattr(command, "commands"):
            context = command.context_class(command, info_name=name, parent=context)
        else:
            context = command.make_context(name, rest, parent=context)
    return context


def _paths(context: Any) -> Iterator[Named]:
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if value is None or isinstance(value, bool):
            continue
        option = next((word for word in parameter.opts if word.startswith("--")), parameter.name.upper())
        if isinstance(value, Path):
            yield Named(option, str(value), file=True)
        elif isinstance(value, str) and parameter.name != "recipe" and context.info_name != "tune":
            if value.endswith(FILES):
                yield Named(option, value, file=True)
            elif parameter.name in PATHS or value.startswith(("./", "../")):
                yield Named(option, value)


def _recipe(name: str) -> tuple[Named, ...]:
    return (Named("the recipe", name, file=True),) if name.endswith(".toml") or "/" in name else ()


def _readable(name: str) -> bool:
    """Only a path of the cluster's own need not be here."""
    return not name.startswith("/") or Path(name).exists()


def _training(spec: TrainingSpec) -> tuple[Named, ...]:
    """What a training reads. `sample` and `tiny-sd` are raysd's own whatever lies beside them."""
    given = (("data.source", spec.data.source, "sample"), ("base", spec.base, "tiny-sd"))
    return tuple(Named(option, text) for option, text, bundled in given if text != bundled)
