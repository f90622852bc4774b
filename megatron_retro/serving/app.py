"""The routes."""

import collections
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from megatron_retro.config.serving import ServeConfig, is_loopback
from megatron_retro.serving.completions import Completions
from megatron_retro.serving.documents import Documents, as_json
from megatron_retro.serving.engine import Engine
from megatron_retro.serving.guard import Guard
from megatron_retro.serving.opening import Opened
from megatron_retro.serving.page import Page
from megatron_retro.serving.requests import Refusal

_LOCAL = {"localhost", "127.0.0.1", "[::1]"}


class Service:
    """Everything behind one port.

    Args:
        config: finished.
        opened: the model and what it reads.
        engine: runs the model; several services may share it.
        key: the token that requests must carry; None for none.
    """

    def __init__(self, config: ServeConfig, opened: Opened, engine: Engine, key: str | None):
        self._config, self._opened, self._engine = config, opened, engine
        self._started, self._active = int(time.time()), 0
        self._counts: collections.Counter[tuple[str, int]] = collections.Counter()
        limits, door, served = config.limits, config.door, config.served
        completions = Completions(engine, opened, limits, served.retrieval, served.model_name, self._place)
        documents = Documents(opened.library, self._place)
        self._routes: dict[tuple[str, str], Callable[[Request], Awaitable[Response]]] = {
            ("GET", "/"): Page(served.model_name, served.retrieval, bool(key), bool(opened.library)).show,
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/completions"): completions.answer,
            ("POST", "/v1/chat/completions"): completions.chat,
            ("GET", "/v1/documents"): documents.list,
            ("POST", "/v1/documents"): documents.add,
            ("DELETE", "/v1/documents/{name}"): documents.remove,
        }
        hosts = _LOCAL | {door.host} if is_loopback(door.host) and not key else None
        self.app = Guard(
            self._fastapi(),
            key=key,
            hosts=hosts,
            max_body_bytes=limits.max_body_bytes,
            deadline_seconds=limits.deadline_seconds,
            count=self._count,
        )

    def _fastapi(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        for (method, path), endpoint in self._routes.items():
            app.add_route(path, endpoint, methods=[method], include_in_schema=False)
        app.add_exception_handler(Refusal, _refused)
        app.add_exception_handler(HTTPException, _not_routed)
        app.add_exception_handler(Exception, _failed)
        return app

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """One of the requests that may wait or run.

        Raises:
            Refusal: there are too many.
        """
        if self._active >= self._config.limits.max_concurrency:
            raise Refusal(429, "too many requests are being served", "too_many_requests", headers={"retry-after": "1"})
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1

    def _count(self, path: str, status: int) -> None:
        known = "/v1/documents/" if path.startswith("/v1/documents/") else path
        self._counts[known if known == "/v1/documents/" or known in {p for _, p in self._routes} else "", status] += 1

    # -------------------------------------------------------------------------------------------- routes

    async def _health(self, request: Request) -> Response:
        alive = self._engine.is_alive
        return as_json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _models(self, request: Request) -> Response:
        name = self._config.served.model_name
        model = {"id": name, "object": "model", "created": self._started, "owned_by": "megatron-retro"}
        return as_json({"object": "list", "data": [model]})

    async def _metrics(self, request: Request) -> Response:
        engine, library = self._engine, self._opened.library
        added, removed = library.counts if library else (0, 0)
        lines = ["# TYPE retro_requests_total counter"]
        for (path, status), count in sorted(self._counts.items()):
            lines.append(f'retro_requests_total{{path="{path or "other"}",status="{status}"}} {count}')
        for name, kind, value in (
            ("retro_prompt_tokens_total", "counter", engine.tokens_read),
            ("retro_written_tokens_total", "counter", engine.tokens_written),
            ("retro_model_seconds_total", "counter", round(engine.model_seconds, 6)),
            ("retro_retrieval_seconds_total", "counter", round(self._opened.reading_seconds, 6)),
            ("retro_requests_active", "gauge", self._active),
            ("retro_requests_waiting", "gauge", engine.num_waiting),
            ("retro_texts_running", "gauge", engine.num_running),
            ("retro_documents_added", "gauge", added),
            ("retro_documents_removed", "gauge", removed),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return as_json(error.as_json(), error.status, error.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    """No such path, or another method."""
    assert isinstance(error, HTTPException)
    message, code = "there is no such path", "not_found"
    if error.status_code == 405:
        message, code = "this path takes other methods", "method_not_allowed"
    return await _refused(request, Refusal(error.status_code, message, code, headers=dict(error.headers or {})))


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, Refusal(500, "the server has failed", "server_error"))
