"""The routes.

POST /v1/chat/completions     needs a key, if there are any
GET  /v1/models, /v1/models/{name}, /metrics     likewise
GET  /health                  200 while requests are taken, 503 otherwise
GET  /openapi.json            the description of all this
"""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Message, Receive, Scope, Send

from ernie_model.inference.request import Generates
from ernie_model.inference.server.answers import Answer, ChatChunk, ChatCompletion
from ernie_model.inference.server.errors import ApiError, invalid
from ernie_model.inference.server.gate import Busy
from ernie_model.inference.server.metrics import CONTENT_TYPE, Outcome
from ernie_model.inference.server.prompts import MediaOpener
from ernie_model.inference.server.protocol import ChatRequest
from ernie_model.inference.server.service import SHUTTING_DOWN, Lagging, Service
from ernie_model.inference.server.settings import ServerSettings
from ernie_model.processor import Processor

logger = logging.getLogger(__name__)


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ernie-train"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok", "draining", "failed"]
    model: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


def make_app(
    engine: Generates,
    processor: Processor,
    settings: ServerSettings,
    *,
    opener: MediaOpener | None = None,
    engine_stats: Callable[[], Any] | None = None,
) -> FastAPI:
    """The application; `app.state.service` is what works behind it.

    Args:
        opener: what image and video addresses lead to; None: the server takes neither.
        engine_stats: returns a dataclass of numbers, shown by /metrics.
    """
    service = Service(engine, processor, settings, opener, engine_stats)
    started = int(time.time())
    model = Model(id=settings.name, created=started)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="ernie serve",
        version="1",
        description="Chat completions as OpenAI's API has them.",
        lifespan=lifespan,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _internal_error)
    with_key = [Depends(_key_check(settings.keys))]
    errors: dict[int | str, dict[str, Any]] = {401: {"model": ErrorAnswer, "description": "No key, or a wrong one"}}

    @app.get(
        "/health",
        response_model=Health,
        responses={503: {"model": Health, "description": "Shutting down, or the engine has failed"}},
    )
    async def health() -> Response:
        status = "failed" if service.failed.is_set() else "draining" if service.draining else "ok"
        return JSONResponse(Health(status=status, model=settings.name).model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", dependencies=with_key, responses=errors, response_class=_Metrics)
    async def metrics() -> Response:
        return _Metrics(service.metrics.text())

    @app.get("/v1/models", dependencies=with_key, responses=errors)
    async def models() -> ModelList:
        return ModelList(data=[model])

    @app.get(
        "/v1/models/{name}",
        dependencies=with_key,
        responses={**errors, 404: {"model": ErrorAnswer, "description": "There is no such model"}},
    )
    async def one_model(name: str) -> Model:
        if name != settings.name:
            raise ApiError(
                404, f"There is no model {name!r}; this server has {settings.name!r}.", code="model_not_found"
            )
        return model

    @app.post(
        "/v1/chat/completions",
        dependencies=with_key,
        response_model=ChatCompletion,
        responses={
            200: {
                "description": "The answer; with stream=true, server-sent events of chunks",
                "content": {"text/event-stream": {"schema": _EVENT}},
            },
            **errors,
            **{status: {"model": ErrorAnswer, "description": text} for status, text in _CHAT_ERRORS.items()},
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
            }
        },
    )
    async def chat(request: Request) -> Response:
        _check_type(request)
        return _Exchange(service)

    make = app.openapi

    def openapi() -> dict[str, Any]:
        """With the request's schema, which FastAPI does not see: it is read off the event loop, in service.py."""
        if app.openapi_schema is None:
            schemas = make()["components"]["schemas"]
            request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= request.pop("$defs")
            schemas["ChatRequest"] = request
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            schemas |= {"ChatChunk": ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")}
            schemas |= schemas["ChatChunk"].pop("$defs")
            for path in app.openapi_schema["paths"].values():  # type: ignore[index]
                for operation in path.values():
                    operation["responses"].pop("422", None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi
    return app


_EVENT = {
    "type": "object",
    "properties": {
        "data": {
            "type": "string",
            "anyOf": [
                {
                    "contentMediaType": "application/json",
                    "contentSchema": {
                        "anyOf": [{"$ref": f"#/components/schemas/{one}"} for one in ("ChatChunk", "ErrorAnswer")]
                    },
                },
                {"const": "[DONE]"},
            ],
        }
    },
    "required": ["data"],
}

_CHAT_ERRORS = {
    400: "A field that is wrong, unknown or not supported",
    404: "There is no such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not application/json",
    429: "All places are taken",
    500: "The engine failed",
    503: "The server is shutting down",
    504: "The answer took too long",
}


class _Metrics(Response):
    media_type = CONTENT_TYPE


# ------------------------------------------------------------------------------------------------- one conversation


class _Gone(Exception):
    """The client has left."""


class _Exchange(Response):
    """Reads a request, answers it, and stops at once when the client leaves or the time is over."""

    def __init__(self, service: Service):
        super().__init__()
        self.service = service
        self.limits = service.settings.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        reply = _Reply(send, self.limits.lag_s)
        try:
            with self.service.answering():
                outcome = await self._conversation(scope, receive, reply, began)
        except ApiError as error:
            await reply.fail(error)
            late, refused = error.status in (408, 504), error.status < 500
            outcome = Outcome.TIMEOUT if late else Outcome.REFUSED if refused else Outcome.FAILED
            outcome = Outcome.BUSY if error.code == "draining" else outcome
        except Busy as busy:
            await reply.fail(
                ApiError(
                    429,
                    f"All places are taken. Ask again in {busy.retry_after} s.",
                    type="rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=busy.retry_after,
                )
            )
            outcome = Outcome.BUSY
        except _Gone:
            outcome = Outcome.GONE
        except Lagging:
            logger.warning("a client was cut off: it took nothing of its answer for %g s", self.limits.lag_s)
            outcome = Outcome.LAGGING
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self.service.ended or task is None:
                raise
            task.uncancel()
            await reply.fail(SHUTTING_DOWN)
            outcome = Outcome.BUSY
        except Exception:
            logger.exception("a request failed")
            await reply.fail(_INTERNAL)
            outcome = Outcome.FAILED
        self.service.metrics.count(outcome)
        if outcome is Outcome.DONE:
            self.service.metrics.seconds.observe(time.monotonic() - began)

    async def _conversation(self, scope: Scope, receive: Receive, reply: "_Reply", began: float) -> Outcome:
        late = ApiError(
            504,
            f"The answer took longer than {self.limits.time_s:g} s. Ask for fewer tokens.",
            type="timeout_error",
            code="timeout",
        )
        try:
            async with asyncio.timeout(self.limits.time_s), self.service.admit():
                late_body = late
                late = ApiError(408, f"The body took longer than {self.limits.time_s:g} s.", type="timeout_error")
                body = await _read_body(scope, receive, self.limits.body_bytes)
                late = late_body
                await _unless_gone(receive, self._answer(body, reply, began))
        except TimeoutError:
            raise late from None
        return Outcome.DONE

    async def _answer(self, body: bytes, reply: "_Reply", began: float) -> None:
        service, metrics = self.service, self.service.metrics
        request = await service.read(body)
        job = await service.prepare(request)
        del body
        answer = Answer(job, service.processor.tokenizer, service.settings.moderation)
        first = True
        async with aclosing(service.attempts(job)) as batches:
            async for batch in batches:
                if first:
                    metrics.first_seconds.observe(time.monotonic() - began)
                    first = False
                chunks = list(answer.take(batch))
                if request.stream:
                    await reply.events([_event(chunk) for chunk in chunks])
                if answer.finished:
                    break
        usage = answer.usage()
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.prompt_tokens_details.cached_tokens)
        metrics.sampled_tokens.inc(usage.completion_tokens)
        if not request.stream:
            await reply.whole(answer.whole().model_dump_json().encode())
            return
        if request.stream_options and request.stream_options.include_usage:
            await reply.events([_event(answer.usage_chunk())])
        await reply.events([b"data: [DONE]\n\n"], last=True)


def _event(chunk: ChatChunk) -> bytes:
    return b"data: " + chunk.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class _Reply:
    """Sends; a send that takes longer than `lag_s` raises Lagging."""

    def __init__(self, send: Send, lag_s: float):
        self._send = send
        self._lag_s = lag_s
        self._begun = self._ended = False

    async def whole(self, body: bytes) -> None:
        await self._start(200, b"application/json", [(b"content-length", str(len(body)).encode())])
        await self._body(body, last=True)

    async def events(self, events: list[bytes], *, last: bool = False) -> None:
        if not self._begun:
            await self._start(200, b"text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")])
        if events:
            await self._body(b"".join(events), last=last)

    async def fail(self, error: ApiError) -> None:
        """As the answer; or, within a stream, as its last event."""
        if self._ended:
            return
        response = error.response()
        try:
            if self._begun:
                await self._body(b"data: " + bytes(response.body) + b"\n\n", last=True)
                return
            await self._send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
            await self._body(bytes(response.body), last=True)
        except Lagging:
            return

    async def _start(self, status: int, kind: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self._begun = True
        start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *headers]}
        await self._patiently(start)

    async def _body(self, body: bytes, *, last: bool) -> None:
        self._ended = last
        await self._patiently({"type": "http.response.body", "body": body, "more_body": not last})

    async def _patiently(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._lag_s):
                await self._send(message)
        except TimeoutError:
            raise Lagging from None


async def _read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytes:
    """Raises ApiError 413 as soon as it is known to be too large; _Gone."""
    too_large = ApiError(413, f"The body has more than {max_bytes:,} bytes. Send fewer or smaller images.")
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large
        if not message.get("more_body", False):
            return bytes(body)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`; cancel it when the client leaves, and raise _Gone."""

    async def leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    job, leave = asyncio.create_task(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait({job, leave}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise _Gone
        job.result()
    finally:
        for task in (job, leave):
            task.cancel()
        await asyncio.gather(job, leave, return_exceptions=True)


# ----------------------------------------------------------------------------------------------------------- the edges


def _check_type(request: Request) -> None:
    """Only JSON: a browser then asks before it sends what another site made up, and is not allowed to."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"The content type is {kind!r}; it must be application/json.")


def _key_check(keys: tuple[str, ...]) -> Callable[[Request], Coroutine[Any, Any, None]]:
    digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def check(request: Request) -> None:
        if not digests:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        matches = [hmac.compare_digest(digest, one) for one in digests]  # all of them, so the time tells nothing
        if scheme.lower() != "bearer" or not any(matches):
            problem = "is not one of this server's" if given else "is missing"
            raise ApiError(
                401,
                f"The key {problem}. Send it as `Authorization: Bearer KEY`.",
                type="authentication_error",
                code="invalid_api_key",
            )

    return check


_INTERNAL = ApiError(500, "The server failed; its log says why.", type="server_error")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 404:
        return ApiError(404, f"There is nothing at {request.url.path}.", code="not_found").response()
    response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}.").response()
    response.headers.update(error.headers or {})
    return response


async def _validation_error(request: Request, error: Exception) -> Response:
    return invalid(str(error)).response()


async def _internal_error(request: Request, error: Exception) -> Response:
    return _INTERNAL.response()
