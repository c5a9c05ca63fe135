"""What all specs share: strictness, reading TOML, setting dotted paths, and describing themselves."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined

from raysd.errors import SpecError


class Spec(BaseModel):
    """A frozen, strict model: an unknown key is refused, defaults stand here and nowhere else."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Fields of which one is given: `override` clears the others when it sets one."""


S = TypeVar("S", bound=Spec)


class Field(NamedTuple):
    """One dotted path of a spec: its type in words, its default (None if required) and its meaning."""

    path: str
    kind: str
    default: Any
    meaning: str


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises SpecError naming the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Notepad begins a file with a mark
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise SpecError(f"{path}: not a readable TOML file: {error}") from None


def load(kind: type[S], values: Mapping[str, Any], origin: str = "") -> S:
    """Validate `values` as a spec. Raises SpecError with one line a wrong field, three at most."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise SpecError(_explain(kind, error, origin)) from None


def override(spec: S, changes: Mapping[str, Any]) -> S:
    """A copy of `spec` with dotted paths set (`{"optim.lr": 3e-5}`), validated as a whole.

    Hyphens and underscores are alike. Where the field is no text, text is read as JSON (numbers, true, null, lists).
    Setting the discriminator of a variant (`method.kind`) keeps the fields that the new variant also has.
    Raises SpecError naming the path.
    """
    values = spec.model_dump(mode="json")
    texts = {row.path for row in describe(type(spec)) if "text" in row.kind.split(" | ")}
    normal = {path.replace("-", "_"): value for path, value in changes.items()}
    normal = {path: _parse(value, text=path in texts) for path, value in normal.items()}
    for path, value in sorted(normal.items(), key=lambda item: not item[0].endswith(".kind")):
        _set(values, path, value, spec)
    _clear_alternatives(values, set(normal), spec)
    return load(type(spec), values)


def describe(kind: type[Spec], prefix: str = "") -> Iterator[Field]:
    """Every dotted path that `override` takes for a spec, variants of a union one after the other."""
    seen: set[str] = set()
    for name, field in kind.model_fields.items():
        models = _models(field.annotation)
        rows = [row for model in models for row in describe(model, f"{prefix}{name}.")]
        if not rows:
            default = None if field.default is PydanticUndefined else field.default
            rows = [Field(prefix + name, _words(field.annotation), default, field.description or "")]
        yield from (row for row in rows if row.path not in seen)
        seen.update(row.path for row in rows)


def _set(values: dict[str, Any], path: str, value: Any, spec: Spec) -> None:
    *parents, last = path.split(".")
    place = values
    for name in parents:
        child = place.get(name)
        if not isinstance(child, dict):
            raise SpecError(f"{path}: unknown path; {_nearest(type(spec), path)}")
        place = child
    if last == "kind" and place.get("kind") != value:
        _switch(values, place, parents, value, spec)
        return
    place[last] = value


def _clear_alternatives(values: dict[str, Any], given: set[str], spec: Spec, prefix: str = "") -> None:
    for name in type(spec).model_fields:
        child = getattr(spec, name)
        if isinstance(child, Spec) and isinstance(values.get(name), dict):
            _clear_alternatives(values[name], given, child, f"{prefix}{name}.")
    if any(prefix + name in given for name in spec.alternatives):
        values.update({name: None for name in spec.alternatives if prefix + name not in given})


def _switch(values: dict[str, Any], place: dict[str, Any], parents: list[str], kind: Any, spec: Spec) -> None:
    """Change the variant at `parents`, dropping the fields that the new one lacks."""
    annotation: Any = type(spec)
    for name in parents:
        model = next(
            p for p in _parts(annotation) if isinstance(p, type) and issubclass(p, Spec) and name in p.model_fields
        )
        annotation = model.model_fields[name].annotation
    for variant in _parts(annotation):
        fields = variant.model_fields if isinstance(variant, type) and issubclass(variant, Spec) else {}
        if "kind" in fields and fields["kind"].default == kind:
            for name in [name for name in place if name not in fields]:
                del place[name]
    place["kind"] = kind


def _parse(value: Any, text: bool) -> Any:
    if not isinstance(value, str) or (text and value != "null"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, through Annotated; a single type alone."""
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in _parts(member)]
    if hasattr(annotation, "__metadata__"):
        return _parts(annotation.__origin__)
    return [annotation]


def _words(annotation: Any) -> str:
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    words = []
    for part in _parts(annotation):
        if get_origin(part) is Literal:
            words += [str(value) for value in get_args(part)]
        elif get_origin(part) is tuple:
            words.append(f"[{', '.join('…' if one is Ellipsis else _words(one) for one in get_args(part))}]")
        else:
            words.append(names.get(part) or str(part).replace("typing.", ""))
    return " | ".join(words)


def _nearest(kind: type[Spec], path: str) -> str:
    import difflib

    known = [row.path for row in describe(kind) if row.path != path]
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "known paths: raysd train RECIPE --help"


def _explain(kind: type[Spec], error: ValidationError, origin: str) -> str:
    known = {row.path for row in describe(kind)}
    lines = []
    for problem in error.errors():
        path = _dotted(problem["loc"], kind)
        if problem["type"] == "extra_forbidden" and path in known:
            lines.append(f"{path}: not for {problem['loc'][0]}.kind {problem['loc'][1]}")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown; {_nearest(kind, path)}")
        elif problem["type"] in ("model_type", "model_attributes_type"):
            example = min((row.path for row in describe(kind) if row.path.startswith(f"{path}.")), default="")
            lines.append(f"{path}: is a table of fields" + (f": set one of them, as {example}" if example else ""))
        elif problem["type"] == "missing":
            lines.append(f"{path}: required")
        else:
            given = "" if isinstance(problem["input"], dict) else f" (got {str(problem['input'])[:80]!r})"
            lines.append(f"{path or 'spec'}: {problem['msg'].removeprefix('Value error, ')}{given}")
    if len(lines) > 3:
        lines = [*lines[:2], f"… and {len(lines) - 2} more fields"]
    return "\n".join(f"{origin}: {line}" if origin else line for line in lines)


def _dotted(loc: tuple[int | str, ...], kind: type[Spec]) -> str:
    """A pydantic location as a dotted path: without the tags of variants, and no deeper than the field itself."""
    path: list[str] = []
    here: Any = kind  # the type of what `path` names
    for part in map(str, loc):
        models = _models(here)
        variants = [model for model in models if len(models) > 1 and part in _tags(model)]
        members = _members(here)
        if variants:
            here = variants[0]
            continue
        if not models and not members:
            break
        fields = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        here = next(iter(fields or members), None)
        path.append(part)
    return ".".join(path)


def _models(annotation: Any) -> list[type[Spec]]:
    """The specs that a value may be."""
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, Spec)]


def _members(annotation: Any) -> list[Any]:
    """The types of a table's values, or of a list's members, that are specs."""
    inner = [one for part in _parts(annotation) if get_origin(part) in (dict, tuple) for one in get_args(part)]
    return [one for one in inner if _models(one)]


def _tags(model: type[Spec]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if "kind" in model.model_fields else ()
