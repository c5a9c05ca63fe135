"""The models that are served: finding the one that a request names, and listing them as both APIs do."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fastapi import APIRouter, Request

from raysd.errors import NotFound, RequestError
from raysd.serve.http.desk import Served, Share
from raysd.serve.http.errors import OPENAI, REPLICATE
from raysd.serve.http.service import Service, may
from raysd.serve.http.wire import Input
from raysd.words import named, shown

OWNER = "raysd"
"""Replicate's names of models are owner/name; here all have this owner."""


class Found(NamedTuple):
    """A served model, and the version that must draw, if the request says which."""

    model: str
    version: str | None


def find(served: Sequence[Served], name: str | None, field: str = "model") -> Found:
    """`cats`, `cats@3`, a version's digest, or any of them after `raysd/` (and `raysd/cats:digest`).

    Raises NotFound, and RequestError where no name is given and there are several.
    """
    here = [model for model in served if model.withdrawn is None]
    offered = f"served here: {named([model.name for model in here], 8) or 'none'}"
    if name is None:
        if len(served) == 1:
            return find(served, served[0].name, field)
        raise RequestError(f"{field}: required; {offered}")
    plain = name.removeprefix(f"{OWNER}/")
    wanted = plain.rpartition(":")[2]
    for model in served:
        if plain == model.name and model.withdrawn is not None:
            raise NotFound(f"{field}: {model.name} is not served now: {model.withdrawn}")
        if plain == model.name:
            return Found(model.name, None)
    for model in here:
        if plain not in (wanted, f"{model.name}:{wanted}"):
            continue
        known = {model.name, *(share.ref.partition("@")[0] for share in _traffic(model))}
        if any(wanted in (share.ref, share.digest) for share in _traffic(model)) or wanted.partition("@")[0] in known:
            return Found(model.name, wanted)
    raise NotFound(f"{field}: no {shown(name)} is served; {offered}")


def _traffic(model: Served) -> Sequence[Share]:
    return model.traffic or (Share(model.ref, model.digest),)


def routes(service: Service) -> APIRouter:
    """GET /v1/models and what lies under it."""
    router, desk = APIRouter(tags=["models"], dependencies=[may("generate")]), service.desk

    @router.get("/v1/models", responses=OPENAI)
    async def models(request: Request) -> dict[str, Any]:
        """All models: under `data` as OpenAI lists them, under `results` as Replicate does."""
        served = [model for model in desk.models() if model.withdrawn is None]
        return {
            "object": "list",
            "data": [_openai(model) for model in served],
            "previous": None,
            "next": None,
            "results": [_replicate(service.base(request), model) for model in served],
        }

    @router.get("/v1/models/{model}", responses=OPENAI)
    async def model(model: str) -> dict[str, Any]:
        """One model, as OpenAI describes it."""
        return _openai(_named(desk.models(), model))

    @router.get("/v1/models/{owner}/{name}", responses=REPLICATE)
    async def owned(request: Request, owner: str, name: str) -> dict[str, Any]:
        """One model, as Replicate describes it."""
        return _replicate(service.base(request), _named(desk.models(), f"{owner}/{name}"))

    @router.get("/v1/models/{owner}/{name}/versions", responses=REPLICATE)
    async def versions(owner: str, name: str) -> dict[str, Any]:
        """The versions in its traffic, the largest share first."""
        found = _named(desk.models(), f"{owner}/{name}")
        results = [_version(found, share) for share in _traffic(found)]
        return {"previous": None, "next": None, "results": results}

    @router.get("/v1/models/{owner}/{name}/versions/{version}", responses=REPLICATE)
    async def version(owner: str, name: str, version: str) -> dict[str, Any]:
        """One of them, by digest or reference."""
        found = _named(desk.models(), f"{owner}/{name}")
        for share in _traffic(found):
            if version in (share.ref, share.digest):
                return _version(found, share)
        raise NotFound(f"version: {shown(version)} is not in the traffic of {found.name}")

    return router


def _named(served: Sequence[Served], name: str) -> Served:
    found = find(served, name)
    return next(model for model in served if model.name == found.model)


def _openai(model: Served) -> dict[str, Any]:
    described = {"id": model.name, "object": "model", "created": int(model.created), "owned_by": OWNER}
    traffic = [{"version": share.ref, "digest": share.digest, "weight": share.weight} for share in _traffic(model)]
    return described | {"version": model.ref, "digest": model.digest, "traffic": traffic}


def _replicate(base: str, model: Served) -> dict[str, Any]:
    return {
        "url": f"{base}/v1/models/{OWNER}/{model.name}",
        "owner": OWNER,
        "name": model.name,
        "description": None,
        "visibility": "private",
        "github_url": None,
        "paper_url": None,
        "license_url": None,
        "run_count": 0,
        "cover_image_url": None,
        "default_example": None,
        "latest_version": _version(model, _traffic(model)[0]),
    }


def _version(model: Served, share: Share) -> dict[str, Any]:
    schemas = {
        "Input": Input.model_json_schema(),
        "Output": {"type": "array", "items": {"type": "string", "format": "uri"}, "title": "Output"},
    }
    return {
        "id": share.digest,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
        "cog_version": "0.9.0",  # clients read from it how to understand the schema
        "openapi_schema": {"openapi": "3.1.0", "components": {"schemas": schemas}},
    }
