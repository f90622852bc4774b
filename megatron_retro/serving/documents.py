"""`/v1/documents`: the database that requests read, changed while it is read."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from megatron_retro.errors import UserError
from megatron_retro.retrieval.live_database import LiveDatabase, NoSuchDocument
from megatron_retro.serving.guard import encoded
from megatron_retro.serving.requests import DocumentsRequest, Refusal, read


class Documents:
    """Adds, removes and lists documents.

    Args:
        library: None for a model that reads nothing.
        place: is entered while documents are embedded; refuses where too many requests are served.
    """

    def __init__(self, library: LiveDatabase | None, place: Callable[[], contextlib.AbstractContextManager[None]]):
        self._given, self._place = library, place

    @property
    def _library(self) -> LiveDatabase:
        if self._given is None:
            raise Refusal(409, "this model reads nothing, so it has no documents", "no_database")
        return self._given

    async def add(self, request: Request) -> Response:
        library, texts = self._library, read(await request.body(), DocumentsRequest).texts
        try:
            library.check_can_add()
        except UserError as error:
            raise Refusal(409, str(error), "cannot_add") from None
        with self._place(), _journaled():
            names = await asyncio.to_thread(library.add, texts)
        return as_json({"object": "list", "data": [_described(name) for name in names]})

    async def remove(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            with self._place(), _journaled():
                await asyncio.to_thread(self._library.remove, [name])
        except NoSuchDocument as error:
            raise Refusal(404, str(error), "document_not_found") from None
        return as_json({**_described(name), "deleted": True})

    async def list(self, request: Request) -> Response:
        library = self._library
        data = [_described(name) for name in library.added]
        return as_json({"object": "list", "data": data, "removed": library.removed})


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(content), status, headers, "application/json")


def _described(name: str) -> dict[str, str]:
    return {"id": name, "object": "document"}


@contextlib.contextmanager
def _journaled() -> Any:
    try:
        yield
    except OSError:
        raise Refusal(507, "the journal cannot be written to, so nothing was changed", "journal") from None
