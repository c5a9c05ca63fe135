"""The page of a blind study: one pair at a time, answered by keyboard or button. Nothing in it says who drew what.

Plain forms, so that a reload or a restart of the server loses nothing: where a reviewer is follows from the votes.
"""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, quote, unquote

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from jinja2 import Environment, StrictUndefined

from raysd.database import Database
from raysd.errors import RaysdError, RequestError
from raysd.host import is_loopback
from raysd.storage import Storage
from raysd.study import studies
from raysd.study.votes import LONGEST_NAME, Answer, Ballot

TEMPLATE = Path(__file__).with_name("page.html.j2")
COOKIE = "raysd_reviewer"
MOST_BYTES = 4096
"""Of a form."""
AHEAD = 2
"""Pairs whose pictures the page loads before they are shown."""
POLICY = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
ANSWERS: dict[str, Answer] = {"left": "left", "right": "right", "tie": "tie"}


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form. 413 for a large one, 400 for bytes that are no form."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, "too large")
    try:
        return dict(parse_qsl(body.decode("ascii"), errors="strict", max_num_fields=8))
    except ValueError:
        raise HTTPException(400, "not a form") from None


def _cookie(request: Request) -> str:
    return unquote(request.cookies.get(COOKIE, ""))


Form = Annotated[dict[str, str], Depends(_form)]
Cookie = Annotated[str, Depends(_cookie)]


def of_study(database: Database, storage: Storage, name: str, *, public: bool = False) -> FastAPI:
    """The application of the study of that name. Raises NotFound, and RequestError while pictures are missing."""
    study, pairs = studies.find(database, name)
    wanted = {picture for pair in pairs for picture in (pair.first_picture, pair.second_picture)}
    there = wanted & studies.drawn(storage, study)
    if there != wanted:
        raise RequestError(
            f"study {name}: {len(there)} of {len(wanted)} pictures are drawn; finish with the same raysd study new"
        )
    return build(Ballot(database, study, pairs), studies.pictures(storage, name), public=public)


def build(ballot: Ballot, pictures: Storage, *, public: bool = False) -> FastAPI:
    """The application. `pictures` holds <name>.png of each pair. If not public, other host names than loopback's are refused."""
    app, pages = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), Pages(ballot, pictures)
    app.get("/")(pages.page)
    app.get("/pictures/{name}.png")(pages.picture)
    app.post("/reviewer")(pages.begin)
    app.post("/leave")(pages.leave)
    app.post("/vote")(pages.vote)
    app.post("/undo")(pages.undo)
    app.exception_handler(RaysdError)(_failed)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        # A page elsewhere must not vote, neither by a form nor by a name of its own that was made to point here.
        if not public and not is_loopback(request.url.hostname or ""):
            return PlainTextResponse("this study is served to this machine alone", 421)
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            return PlainTextResponse("this form came from another site", 403)
        response = await answer(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    return app


class Pages:
    """What each address answers."""

    def __init__(self, ballot: Ballot, pictures: Storage):
        self.ballot, self.pictures = ballot, pictures
        self.names = {name for pair in ballot.pairs for name in (pair.first_picture, pair.second_picture)}
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self.template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))

    def page(self, cookie: Cookie) -> Response:
        """The pair to be judged, or the question for a name."""
        try:
            reviewer = self.ballot.known_as(cookie)
        except RequestError:
            reviewer = None
        turn = self.ballot.turn(reviewer) if reviewer else None
        nonce = secrets.token_urlsafe(16)
        html = self.template.render(reviewer=reviewer, turn=turn, nonce=nonce, longest=LONGEST_NAME, ahead=AHEAD)
        allowed = f"img-src 'self' data:; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; form-action 'self'"
        return HTMLResponse(html, headers={"Content-Security-Policy": f"{POLICY}; {allowed}"})

    def picture(self, name: str) -> Response:
        """PNG. 404 for what is not of this study."""
        if name not in self.names:
            raise HTTPException(404)
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(self.pictures.read(f"{name}.png"), media_type="image/png", headers=headers)

    def begin(self, form: Form) -> Response:
        """Remember who is reviewing."""
        response = _home()
        name = quote(self.ballot.known_as(form.get("name", "")))
        response.set_cookie(COOKIE, name, max_age=30 * 86400, httponly=True, samesite="lax")
        return response

    def leave(self) -> Response:
        """Forget who was reviewing; the answers stay."""
        response = _home()
        response.delete_cookie(COOKIE, httponly=True, samesite="lax")
        return response

    def vote(self, form: Form, cookie: Cookie) -> Response:
        """Keep an answer."""
        answer = ANSWERS.get(form.get("answer", ""))
        if answer is None:
            raise RequestError("an answer is left, right or tie")
        self.ballot.vote(self._reviewer(form, cookie), form.get("pair", ""), answer)
        return _home()

    def undo(self, form: Form, cookie: Cookie) -> Response:
        """Take the last answer back."""
        self.ballot.undo(self._reviewer(form, cookie))
        return _home()

    def _reviewer(self, form: dict[str, str], cookie: str) -> str:
        """Who reviews, where the page was shown to them: another's has other sides."""
        reviewer = self.ballot.known_as(cookie)
        if form.get("reviewer", "").casefold() != reviewer.casefold():
            raise RequestError(f"that page was shown to somebody else, and {reviewer} reviews now: reload the page")
        return reviewer


def _home() -> RedirectResponse:
    return RedirectResponse("/", 303)


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return PlainTextResponse(str(error), 400)
    return PlainTextResponse("the store did not answer, and nothing was changed: go back and try again", 503)
