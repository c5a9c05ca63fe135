"""What a check found, as plain data: the report, and the words for its warnings and refusals."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

from raysd.config.data import DataSpec
from raysd.data.balance import Balance
from raysd.errors import DataError
from raysd.words import counted, named, shown

FEWEST = 5
RECOMMENDED = 10
UNEVEN = 3.0
"""The largest group over the smallest, from which a warning is due."""
ALIKE = 0.15
"""Diversity below which a warning is due."""


class Finding(BaseModel):
    """A picture and what is the matter with it: a reason, or the measure."""

    model_config = ConfigDict(frozen=True)
    name: str
    what: str


class Duplicates(BaseModel):
    """Files that hold one picture. The first is the one that is used."""

    model_config = ConfigDict(frozen=True)
    names: tuple[str, ...]
    exact: bool
    """The same bytes, all of them."""
    captions_differ: bool


class Report(BaseModel):
    """What the check found and did. Names are relative to the source; everything in it is JSON."""

    model_config = ConfigDict(frozen=True)
    origin: str
    found: int
    """Pictures in the source."""
    used: int
    """Pictures left after everything that was left out or dropped."""
    unreadable: tuple[Finding, ...]
    """Left out, with the reason."""
    upscaled: tuple[str, ...]
    """The shorter side has fewer pixels than data.resolution."""
    duplicates: tuple[Duplicates, ...]
    blurry: tuple[Finding, ...]
    """Blurred or blank, duplicates that are dropped aside; `what` is `facts.blur`."""
    outliers: tuple[Finding, ...]
    """Noise, or unlike all others; `what` is the score of `compare.outlier_scores`."""
    dropped: tuple[str, ...]
    """Readable and not used: duplicates, and blurry pictures and outliers where the spec says so."""
    missing_captions: tuple[str, ...]
    """Used pictures without a caption of their own."""
    without_caption: int
    """How many of them have no caption in the end either."""
    replaced_captions: int
    """Captions that are there and not used, because data.prompt is one prompt for all."""
    diversity: float | None
    """0 copies of one picture, 1 all quite different (Vendi score over the number of pictures); None for none."""
    balance: tuple[Balance, ...]
    """How often each caption and each folder occurs, and the weights that would even it out."""
    examples: tuple[str, ...]
    """Some of the used pictures, chosen by content."""
    warnings: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    """Why these pictures cannot be trained on as they are; empty if they can."""
    train: int | None = None
    """Pictures trained on; None before the split."""
    validation: int | None = None

    def raise_if_refused(self) -> None:
        """Raises DataError with the refusals, three lines at most."""
        if self.refusals:
            raise DataError("\n".join(f"{self.origin}: {line}" for line in self.refusals[:3]))


def refusals(report: Report, spec: DataSpec) -> Iterator[str]:
    """Why the pictures cannot be used as they are, each with the remedy."""
    # A single bad file does not stop a small set, unless none at all is accepted.
    accepted = max(1, int(spec.unreadable * report.found)) if spec.unreadable else 0
    if len(report.unreadable) > accepted:
        first = "; ".join(f"{shown(f.name, 60)}: {f.what}" for f in report.unreadable[:2])
        yield (
            f"{len(report.unreadable):,} of {counted(report.found, 'picture')} unreadable ({first}); "
            "repair or remove them, or raise data.unreadable"
        )
    if report.without_caption:
        names = named(report.missing_captions)
        yield (
            f"{counted(report.without_caption, 'picture')} without a caption ({names}); "
            "write NAME.txt beside each, or give data.prompt"
        )
    if not report.used:
        yield "no picture is left to train on; see raysd data check"
    elif report.used < FEWEST and not spec.force:
        few = counted(report.used, "picture")
        yield f"{few}, {FEWEST} are the least: add some (10 to 20 are good) or set data.force"


def warnings(report: Report, spec: DataSpec) -> Iterator[str]:
    """What was done or should be known, a line each."""
    yield from _left_out(report, spec)
    if FEWEST <= report.used < RECOMMENDED or (report.used < FEWEST and spec.force):
        yield f"{counted(report.used, 'picture')}: 10 to 20 are recommended for a subject or a style"
    if report.upscaled:
        yield (
            f"{counted(len(report.upscaled), 'picture')} smaller than data.resolution {spec.resolution}, "
            f"scaled up: {named(report.upscaled)}"
        )
    if report.diversity is not None and report.used > 1 and report.diversity < ALIKE:
        yield f"the pictures are much alike (diversity {report.diversity:.2f}): vary angle, background and light"
    yield from _about_captions(report, spec)
    for balance in report.balance:
        if balance.ratio >= UNEVEN:
            most, least = (f"{g.count:,} x {shown(g.key, 40)!r}" for g in (balance.groups[0], balance.groups[-1]))
            remedy = "" if spec.balance == balance.axis else f'; data.balance = "{balance.axis}" evens it out'
            yield f"uneven {balance.axis}s: {most}, {least}{remedy}"


def _left_out(report: Report, spec: DataSpec) -> Iterator[str]:
    if report.unreadable:
        names = named([f"{finding.name} ({finding.what})" for finding in report.unreadable])
        yield f"{counted(len(report.unreadable), 'unreadable picture')} left out: {names}"
    again = [f"{name} (= {group.names[0]})" for group in report.duplicates for name in group.names[1:]]
    if again:
        yield f"{counted(len(again), 'duplicate')} {_done(spec.duplicates)}: {named(again)}"
    if any(group.captions_differ for group in report.duplicates):
        names = named([group.names[0] for group in report.duplicates if group.captions_differ])
        yield f"duplicates with different captions, of which the first is used: {names}"
    for findings, noun, action in (
        (report.blurry, "blurry or blank picture", spec.blurry),
        (report.outliers, "picture", spec.outliers),
    ):
        what = " unlike all others" if noun == "picture" else ""
        if findings:
            yield f"{counted(len(findings), noun)}{what} {_done(action)}: {named([f.name for f in findings])}"


def _about_captions(report: Report, spec: DataSpec) -> Iterator[str]:
    default = len(report.missing_captions) - report.without_caption
    if default and report.used > default:
        yield f"{counted(default, 'picture')} without a caption, data.prompt is used: {named(report.missing_captions)}"
    elif default:
        yield f"no picture has a caption of its own: data.prompt is used for all {default:,}"
    if report.replaced_captions:
        yield (
            f"{counted(report.replaced_captions, 'caption')} not used, data.prompt is one prompt for all; "
            "put {caption} into it to keep them"
        )


def _done(action: str) -> str:
    return "dropped" if action == "drop" else "kept"
