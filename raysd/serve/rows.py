"""Between the queue's values and the rows that keep them."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from raysd.feedback.tables import GenerationRow
from raysd.idempotency import Seal
from raysd.serve.predictions import NewPrediction, Picture, Prediction
from raysd.serve.tables import PredictionRow


def new_row(id: str, new: NewPrediction, seal: Seal | None, now: float) -> PredictionRow:
    """A row that waits in the queue."""
    ask = new.ask
    return PredictionRow(
        id=id,
        api=ask.api,
        owner=ask.owner,
        user=ask.user,
        model=ask.model,
        ref=new.ref,
        digest=new.digest,
        drawing=ask.drawing.model_dump(mode="json"),
        count=ask.drawing.count,
        status="starting",
        metrics={},
        created=now,
        deadline=ask.deadline,
        cancel_requested=False,
        attempt=0,
        token=0,
        webhook=ask.webhook,
        webhook_events=list(ask.webhook_events),
        withhold=ask.withhold,
        shadow_of=new.shadow_of,
        comparison=ask.comparison,
        seal_name=seal and seal.name,
        seal_body=seal and seal.body,
        request_id=ask.request_id,
        traceparent=ask.traceparent,
    )


def generation(row: PredictionRow, picture: Picture, now: float, kept_until: float | None) -> GenerationRow:
    """What is recorded of a picture that was drawn."""
    said = dict(row.drawing)
    prompt, negative = said.pop("prompt"), said.pop("negative")
    return GenerationRow(
        id=f"{row.id}-{picture.number}",
        prediction_id=row.id,
        number=picture.number,
        prompt=None if row.withhold else prompt,
        negative=None if row.withhold else negative,
        seed=picture.seed,
        parameters={name: value for name, value in said.items() if name not in ("seed", "count")},
        model=row.model,
        ref=row.ref,
        digest=row.digest,
        path=picture.path,
        sha256=picture.sha256,
        width=picture.width,
        height=picture.height,
        owner=row.owner,
        user=row.user,
        comparison=row.comparison,
        blind=row.comparison is not None,
        shadow_of=row.shadow_of and f"{row.shadow_of}-{picture.number}",
        created=now,
        kept_until=kept_until,
    )


def read(session: Session, rows: Sequence[PredictionRow]) -> list[Prediction]:
    """The rows as predictions, with the pictures and prompts that their generations hold."""
    drawn: dict[str, list[GenerationRow]] = {row.id: [] for row in rows}
    done = [row.id for row in rows if row.status == "succeeded"]
    if done:
        of_these = select(GenerationRow).where(GenerationRow.prediction_id.in_(done)).order_by(GenerationRow.number)
        for found in session.scalars(of_these):
            drawn[found.prediction_id].append(found)
    return [_prediction(row, drawn[row.id]) for row in rows]


def _prediction(row: PredictionRow, drawn: Sequence[GenerationRow]) -> Prediction:
    said = next(({"prompt": g.prompt, "negative": g.negative} for g in drawn if g.prompt is not None), {})
    there = [
        Picture(g.number, g.path, g.sha256, g.seed, g.width, g.height)
        for g in drawn
        if g.path is not None and g.deleted is None
    ]
    return Prediction(
        id=row.id,
        api=row.api,
        owner=row.owner,
        user=row.user or next((g.user for g in drawn if g.user), None),
        model=row.model,
        ref=row.ref,
        digest=row.digest,
        drawing={**row.drawing, **said},
        status=row.status,
        error=row.error,
        pictures=there,
        metrics=row.metrics,
        created=row.created,
        started=row.started,
        completed=row.completed,
        deadline=row.deadline,
        cancel_requested=row.cancel_requested,
        attempt=row.attempt,
        webhook=row.webhook,
        webhook_events=row.webhook_events,
        withhold=row.withhold,
        shadow_of=row.shadow_of,
        comparison=row.comparison,
        blind=row.comparison is not None and all(g.blind for g in drawn),
        request_id=row.request_id,
        traceparent=row.traceparent,
        deleted=row.deleted,
    )
