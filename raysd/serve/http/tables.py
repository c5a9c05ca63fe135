"""The table of messages to webhooks. Times are epoch seconds."""

from sqlalchemy import Double, ForeignKey, Index, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from raysd.database import Base


class MessageRow(Base):
    """One message: that a prediction began, or ended. `due` is null once it was taken or given up.

    `base` is what the addresses in it begin with.
    """

    __tablename__ = "webhook_messages"
    __table_args__ = (Index("ix_webhook_messages_due", "due"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    prediction_id: Mapped[str] = mapped_column(ForeignKey("predictions.id"))
    event: Mapped[str] = mapped_column(String(10))
    base: Mapped[str] = mapped_column(Text)
    tries: Mapped[int]
    due: Mapped[float | None] = mapped_column(Double)
