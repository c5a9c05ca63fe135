"""`raysd models`, `raysd generate` and `raysd export`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raysd.cli.output import Json, check_writable, flat, open_registry, open_storage, out, pairs, show, table
from raysd.console import Watcher
from raysd.errors import RequestError

app = typer.Typer()
models_app = typer.Typer(no_args_is_help=True, help="Versions in the registry.")


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """All models, their versions and aliases."""
    rows = [
        {"model": m.name, "versions": list(m.versions), "aliases": dict(m.aliases)} for m in open_registry().models()
    ]
    show(rows, as_json, lambda: table(rows, "model", "versions", "aliases"))


@models_app.command("show")
def models_show(ref: str, as_json: Json = False) -> None:
    """One version: its files, where it comes from, and what its evaluations found."""
    from raysd.evaluate.kept import of_version

    version = open_registry().resolve(ref, withdrawn_ok=True)
    body = {
        "ref": version.ref,
        "digest": version.digest,
        "created": version.created,
        "withdrawn": version.withdrawn,
        "files": [{"path": file.path, "sha256": file.sha256, "size": file.size} for file in version.files],
        "record": version.record,
        "evaluations": of_version(version, open_storage()),
    }
    show(body, as_json, lambda: pairs(flat(body)))


@models_app.command("alias")
def models_alias(ref: str, name: str, as_json: Json = False) -> None:
    """Point an alias at a version."""
    registry = open_registry()
    version = registry.resolve(ref)
    registry.alias(version, name)
    _show_alias(version.model, name, version.ref, as_json)


@models_app.command("history")
def models_history(model: str, alias: str, as_json: Json = False) -> None:
    """Every move of an alias, oldest first."""
    rows = [asdict(move) for move in open_registry().history(model, alias)]
    show(rows, as_json, lambda: table(rows, *(rows[0] if rows else ())))


@models_app.command("rollback")
def models_rollback(model: str, alias: str, as_json: Json = False) -> None:
    """Point an alias at the version it had before."""
    move = open_registry().rollback(model, alias)
    _show_alias(model, alias, f"{model}@{move.version}", as_json)


@models_app.command("withdraw")
def models_withdraw(
    ref: str,
    reason: Annotated[str, typer.Option(help="Why; kept with the version.")] = "",
    as_json: Json = False,
) -> None:
    """Take a version out of use; it is kept, and never resolved again."""
    registry = open_registry()
    version = registry.resolve(ref, withdrawn_ok=True)
    registry.withdraw(version, reason)
    show({"ref": version.ref, "withdrawn": reason}, as_json, lambda: f"withdrew {version.ref}")


@models_app.command("sign")
def models_sign(
    ref: str, key: Annotated[Path, typer.Option(help="Ed25519 private key, PEM: openssl genpkey -algorithm ed25519.")]
) -> None:
    """Vouch for a version: services that name your public key as a signer load it."""
    from raysd.registry import signing

    registry = open_registry()
    version = registry.resolve(ref)
    name = signing.sign(registry.storage, version, signing.read_key(key))
    out.print(f"signed {version.ref} as {name}", soft_wrap=True)


@models_app.command("verify")
def models_verify(ref: str, as_json: Json = False) -> None:
    """Compare a version's files with their digests."""
    registry = open_registry()
    version = registry.resolve(ref, withdrawn_ok=True)
    problems = registry.verify(version)
    show({"ref": version.ref, "problems": problems}, as_json, lambda: "\n".join(problems) or f"{version.ref} is whole")
    if problems:
        raise typer.Exit(1)


@models_app.command("gc")
def models_gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go.")] = False, as_json: Json = False
) -> None:
    """Remove files that no version refers to."""
    collected = asdict(open_registry().collect(dry_run=dry_run))
    show(collected, as_json, lambda: pairs(collected))


def _show_alias(model: str, alias: str, ref: str, as_json: bool) -> None:
    show({"model": model, "alias": alias, "ref": ref}, as_json, lambda: f"{model}:{alias} -> {ref}")


@app.command()
def generate(
    ref: Annotated[str, typer.Argument(help="tiny-sd, a folder, file.safetensors, org/name, name@3 or name:alias.")],
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    to: Annotated[Path, typer.Option("--out", help="PNG file; with --count, -1, -2 … go before its suffix.")],
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Picture n has seed + n.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(min=0, max=100, help="Classifier-free guidance scale.")] = 7.5,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 1,
) -> None:
    """Draw pictures with a model."""
    if to.suffix.lower() != ".png":
        raise RequestError(f"--out {to}: name a .png file")
    from raysd.draw import MAX_SEED, Request, draw, save_png
    from raysd.references import locate
    from raysd.words import is_text, shown

    if seed + count - 1 > MAX_SEED:
        raise RequestError(f"--seed {seed}: at most {MAX_SEED - count + 1} with --count {count}")
    for option, text in (("--prompt", prompt), ("--negative", negative or "")):
        if not is_text(text):
            raise RequestError(f"{option} {shown(text)}: is not UTF-8")
    located = locate(ref, open_storage())
    paths = [to if count == 1 else to.with_stem(f"{to.stem}-{number + 1}") for number in range(count)]
    check_writable("--out", *paths)
    request = Request(prompt, negative, seed, steps, guidance, count)
    with Watcher() as watch:
        images = draw(located, [request], lambda d, n: watch({"kind": "count", "text": "draw", "done": d, "of": n}))
    for number, (image, path) in enumerate(zip(images, paths, strict=True)):
        save_png(image, path, located, request.of(number))
        out.print(str(path), soft_wrap=True)


@app.command()
def export(
    ref: str,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder or file to write; must not exist. onnx: kept in the store for serving if not given."
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="diffusers: a folder for from_pretrained. kohya: a LoRA file for A1111, ComfyUI. "
            "onnx: graphs for ONNX Runtime; with --out a LoRA is merged in.",
        ),
    ] = "diffusers",
    precision: Annotated[str | None, typer.Option(help="onnx: fp32 (if not given), fp16 or int8.")] = None,
) -> None:
    """Write a model for other programs."""
    from raysd.export import EXPORTS

    if form not in (*EXPORTS, "onnx"):
        raise RequestError(f"--format {form}: one of {', '.join(EXPORTS)}, onnx")
    if form == "onnx":
        from raysd.export.kept import export_onnx

        with Watcher() as watch:
            out.print(export_onnx(ref, open_storage(), to, precision or "fp32", watch), soft_wrap=True)
        return
    if to is None or precision is not None:
        raise RequestError(
            f"--out: --format {form} needs it" if to is None else "--precision: --format onnx alone has it"
        )
    EXPORTS[form](ref, open_storage(), to)
    out.print(str(to), soft_wrap=True)
