"""`raysd demo`: train a LoRA on the bundled sample, publish it, and show before and after."""

from pathlib import Path

from rich.table import Table

from raysd.config import TrainingSpec
from raysd.console import Watcher
from raysd.draw import Request, draw, grid
from raysd.errors import TrainingFailed
from raysd.references import locate
from raysd.storage import Storage
from raysd.train.launch import train
from raysd.train.runs import RunRecord

RUN = "demo"
PICTURE = Path("demo.png")
PROMPTS = (
    "a zorb on a blue background",
    "a zorb on a yellow background",
    "a large zorb on a white background",
    "a red circle on a green background",
)


def run_demo(spec: TrainingSpec, root: Storage, watch: Watcher) -> Table:
    """Train (or take the finished run), draw, and sum up. Raises TrainingFailed if the run was interrupted."""
    outcome = train(spec, RUN, root, watch)
    if not outcome.finished:
        raise TrainingFailed(f"stopped at step {outcome.record.step}: raysd demo goes on from there")
    assert outcome.record.version is not None
    watch({"kind": "phase", "text": "drawing before and after"})
    requests = [Request(prompt, seed=n, guidance=3.5) for n, prompt in enumerate(PROMPTS)]
    before = draw(locate(spec.base, root), requests)
    after = draw(locate(outcome.record.version, root), requests)
    grid([*before, *after], columns=len(PROMPTS), scale=3).save(PICTURE)
    return _summary(outcome.record)


def _summary(record: RunRecord) -> Table:
    table = Table(title="raysd demo", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("version published", str(record.version))
    table.add_row("validation loss of the base", f"{record.base_loss:.4f}")
    table.add_row("validation loss of the version", f"{record.loss:.4f}")
    table.add_row("before (above) and after (below)", str(PICTURE.resolve()))
    table.add_row("next", f"raysd generate {record.version} --prompt 'a zorb on a red background' --out zorb.png")
    table.add_row("", f"raysd models show {record.version}")
    table.add_row("", "raysd train lora-demo --name mine --data.source YOUR_FOLDER --publish.model mine")
    return table
