"""Which scores see that a model was damaged: tiny-sd, and three copies of it with more and more noise in their weights.

Each weight of the U-Net gets normal noise of `strength` times the standard deviation of its tensor. All four are evaluated
alike, against renderings that none was trained on, by the bundled judge; a score is right where it orders all four.
"""

import shutil
from pathlib import Path
from typing import Any

from benchmarks import spawned
from benchmarks.options import Options
from benchmarks.results import Result, Table, Target

STRENGTHS = (0.0, 0.15, 0.3, 0.6)
PICTURES, DATA = 256, 512
MUST = ("validation_loss", "fid", "kid", "clip_score")
OTHERS = ("inception_score", "precision", "recall")
HIGHER = ("clip_score", "inception_score", "precision", "recall")


def run(options: Options) -> Result:
    pictures, data = (16, 40) if options.quick else (PICTURES, DATA)
    found = [spawned.alone(_evaluated, str(options.work), strength, pictures, data) for strength in STRENGTHS]
    names = [name for name in (*MUST, *OTHERS) if name in found[0]]
    rows = [
        [name, *(f"{scores[name]['value']:.4g}" for scores in found), found[0][name]["n"], "yes" if right else "no"]
        for name, right in ((name, _ordered(name, found)) for name in names)
    ]
    columns = ["score", *(f"noise {strength:g}" for strength in STRENGTHS), "n", "orders all four"]
    return Result(
        targets=[Target(f"{name} orders all four", float(_ordered(name, found)), 1.0, True, "") for name in MUST],
        tables=[Table("Scores of a damaged model", columns, rows)],
        samples={name: [scores[name]["value"] for scores in found] for name in names},
        settings={"strengths": STRENGTHS, "pictures": pictures, "data": data, "judge": "tiny-clip"},
    )


def _ordered(name: str, found: list[dict[str, Any]]) -> bool:
    """Whether each model scores worse than the less damaged one before it."""
    values = [scores[name]["value"] for scores in found]
    return values == sorted(values, reverse=name in HIGHER) and len(set(values)) == len(values)


def _evaluated(work: str, strength: float, pictures: int, data: int) -> dict[str, Any]:
    """{score: {value, n}} of the bundled base with noise of that strength."""
    from raysd.assets.make.renderer import write_dataset
    from raysd.config import EvaluationSpec, load
    from raysd.evaluate.evaluation import evaluate
    from raysd.storage import Storage

    folder = Path(work)
    if not (folder / "data").exists():
        write_dataset(folder / "data", data, seed=101)
    model = _damaged(folder / f"damaged-{strength:g}", strength)
    values = {
        "count": pictures,
        "workers": 0,
        "losses": min(64, data // 4),
        "data": {"source": str(folder / "data"), "resolution": 64, "validation": 0.25},
    }
    spec = load(EvaluationSpec, values)
    found = evaluate(str(model), None, spec, Storage(str(folder / "store")), _say).model
    loss = found.losses.validation if found.losses else None
    scores = {score.name: {"value": score.value, "n": score.n} for score in found.scores}
    return scores | ({"validation_loss": {"value": loss.value, "n": loss.n}} if loss else {})


def _damaged(folder: Path, strength: float) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    from raysd.assets import asset

    shutil.copytree(asset("tiny-sd"), folder)
    [path] = (folder / "unet").glob("*.safetensors")
    noise = torch.Generator().manual_seed(1)
    weights = {}
    for name, weight in sorted(load_file(path).items()):
        spread = weight.float().std() if weight.numel() > 1 else torch.tensor(0.0)
        weights[name] = (weight + strength * spread * torch.randn(weight.shape, generator=noise)).to(weight.dtype)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def _say(event: dict[str, Any]) -> None:
    if event["kind"] == "phase":
        print(f"  {event['text']}", flush=True)
