"""The HTTP API. Handlers parse, ask the parts, and shape answers; every error leaves in one form."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tandem import __version__
from tandem.common.errors import InternalError, InvalidRequest, ModelNotFound, Overloaded, TandemError
from tandem.common.tokenizer import Tokenizer
from tandem.router.admission import Admission
from tandem.router.completions import Completions
from tandem.router.dispatch import Dispatcher
from tandem.router.formats import AnswerFormat, ChatFormat, CompletionFormat
from tandem.router.membership import Discovery, Membership
from tandem.router.metrics import RouterMetrics
from tandem.router.middleware import ApiKey, HttpMetrics, LastWord, RequestId
from tandem.router.model_info import read_sampling_defaults, read_vocab_size
from tandem.router.openai import ModelLimits, parse_chat, parse_completion, to_request
from tandem.router.prompts import PromptBuilder
from tandem.router.responses import EventStream, MethodNotAllowed, NotFound, error_response, read_body, until_gone
from tandem.router.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    parse_json,
    request_body,
    validate,
)
from tandem.router.settings import RouterSettings
from tandem.router.status import cluster_status, not_ready_reason
from tandem.router.work import ParsedRequest


@dataclass(frozen=True, slots=True)
class Services:
    """The router's parts, put together once."""

    settings: RouterSettings
    tokenizer: Tokenizer
    vocab_size: int
    defaults: dict[str, float]
    prompts: PromptBuilder
    admission: Admission
    membership: Membership
    completions: Completions
    metrics: RouterMetrics

    @classmethod
    def create(cls, settings: RouterSettings, registry: Discovery) -> Services:
        """Raises ModelError, ConfigError. Call it inside the event loop that will run the router."""
        directory = Path(settings.model_dir)
        tokenizer = Tokenizer.load(directory)
        defaults = read_sampling_defaults(directory) if settings.generation_config == "auto" else {}
        metrics = RouterMetrics(settings.served_model_names[0])
        membership = Membership(registry, settings.cluster_key, settings.max_model_len)
        metrics.follow(membership)
        dispatcher = Dispatcher(settings, membership, metrics)
        admission = Admission(settings.max_num_queued_reqs, settings.max_num_queued_tokens, settings.max_queue_wait)
        metrics.watch_queue(admission)
        completions = Completions(dispatcher, admission, tokenizer, metrics, settings.queue_timeout)
        prompts = PromptBuilder(tokenizer)
        vocab_size = read_vocab_size(directory)
        return cls(settings, tokenizer, vocab_size, defaults, prompts, admission, membership, completions, metrics)


class Api:
    """The handlers. Each raises TandemError; `create_app` turns those into answers."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._started = int(time.time())
        self._parsing = 0  # requests between their body and admission

    # ------------------------------------------------------------------ generation

    async def chat(self, request: Request) -> Any:
        parsed = await self._parsed(request, self._parse_chat)
        return await self._answer(request, parsed, ChatFormat(parsed))

    async def _parse_chat(self, data: bytes, arrival: float) -> ParsedRequest:
        body = parse_chat(data)
        self._check_model(body.model)
        prompt = await self._services.prompts.chat(
            body.messages, body.add_generation_prompt is not False, body.chat_template_kwargs or {}
        )
        return to_request(body, [prompt], await self._limits(), arrival)

    async def completions(self, request: Request) -> Any:
        parsed = await self._parsed(request, self._parse_completion)
        return await self._answer(request, parsed, CompletionFormat(parsed))

    async def _parse_completion(self, data: bytes, arrival: float) -> ParsedRequest:
        body = parse_completion(data)
        self._check_model(body.model)
        prompts = await self._services.prompts.completion(body)
        return to_request(body, prompts, await self._limits(), arrival)

    async def _parsed(
        self, request: Request, parse: Callable[[bytes, float], Coroutine[Any, Any, ParsedRequest]]
    ) -> ParsedRequest:
        """What comes before admission, bounded like what comes behind it, in requests and in time.

        Raises Overloaded before the body is looked at when there is no room for any request.
        """
        settings = self._settings
        data = await read_body(request, settings.max_body_bytes)
        self._services.admission.check()
        if self._parsing >= settings.max_num_queued_reqs:
            raise Overloaded(f"{self._parsing} requests already wait to be admitted; try again", retry_after=1.0)
        self._parsing += 1
        limit = min(settings.queue_timeout, settings.request_timeout)
        try:
            return await until_gone(request.receive, parse(data, time.monotonic()), limit)
        except TimeoutError as exc:
            raise Overloaded(f"the request could not be admitted within {limit:g} s; try again") from exc
        finally:
            self._parsing -= 1

    async def _answer(self, request: Request, parsed: ParsedRequest, form: AnswerFormat) -> Any:
        completions = self._services.completions
        if parsed.output.stream:
            return EventStream(lambda outbox: completions.stream(parsed, form, outbox), self._settings.keep_alive)
        return JSONResponse(await until_gone(request.receive, completions.whole(parsed, form)))

    async def _limits(self) -> ModelLimits:
        """Raises Overloaded when no worker has told its context length in time."""
        services, settings = self._services, self._settings
        if not await services.membership.wait_for(services.membership.can_serve, settings.worker_wait):
            raise Overloaded("no decode worker is ready; try again later", retry_after=settings.worker_wait)
        length = services.membership.max_model_len
        if length is None:
            raise InternalError("a worker is ready, but its context length is not known")
        return ModelLimits(
            max_model_len=length,
            vocab_size=services.vocab_size,
            eos_token_ids=services.tokenizer.eos_token_ids,
            defaults=services.defaults,
            timeout=settings.request_timeout,
        )

    def _check_model(self, name: str | None) -> None:
        names = self._settings.served_model_names
        if name is not None and name not in names:
            raise ModelNotFound(f"The model {name!r} does not exist; this server has {', '.join(names)}", param="model")

    # ------------------------------------------------------------------ models and tokens

    async def models(self, request: Request) -> Any:
        return {"object": "list", "data": [self._model(name) for name in self._settings.served_model_names]}

    async def model(self, request: Request) -> Any:
        name: str = request.path_params["name"]
        self._check_model(name)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "root": self._settings.served_model_names[0],
            "parent": None,
            "max_model_len": self._services.membership.max_model_len,
        }

    async def tokenize(self, request: Request) -> Any:
        body = validate(TokenizeBody, parse_json(await read_body(request, self._settings.max_body_bytes)))
        self._check_model(body.model)
        ids = await self._token_ids(body)
        backend = self._services.tokenizer
        return {
            "count": len(ids),
            "max_model_len": self._services.membership.max_model_len,
            "tokens": ids,
            "token_strs": [backend.token(token_id) for token_id in ids] if body.return_token_strs else None,
        }

    async def _token_ids(self, body: TokenizeBody) -> list[int]:
        prompts = self._services.prompts
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("send either prompt or messages", param="prompt")
        if body.messages is not None:
            kwargs = body.chat_template_kwargs or {}
            return await prompts.chat(body.messages, body.add_generation_prompt is not False, kwargs)
        return await prompts.encode(body.prompt or "", body.add_special_tokens is not False)

    async def detokenize(self, request: Request) -> Any:
        body = validate(DetokenizeBody, parse_json(await read_body(request, self._settings.max_body_bytes)))
        self._check_model(body.model)
        for token_id in body.tokens:
            if not 0 <= token_id < self._services.vocab_size:
                raise InvalidRequest(f"tokens holds {token_id}, which is no token id of this model", param="tokens")
        return {"prompt": await self._services.prompts.decode(body.tokens, skip_special_tokens=False)}

    # ------------------------------------------------------------------ operation

    async def live(self, request: Request) -> Any:
        return {"status": "live"}

    async def ready(self, request: Request) -> Any:
        reason = not_ready_reason(self._settings, self._services.membership)
        if reason is not None:
            raise Overloaded(f"not ready: {reason}", retry_after=1.0)
        return {"status": "ready"}

    async def metrics(self, request: Request) -> Any:
        return Response(self._services.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def version(self, request: Request) -> Any:
        return {"version": __version__}

    async def status(self, request: Request) -> Any:
        return cluster_status(self._settings, self._services.membership)


def create_app(services: Services) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        services.membership.start()
        yield
        await services.membership.stop()
        services.prompts.close()

    # Documentation pages would load scripts from elsewhere; /openapi.json is all that tools need.
    app = FastAPI(
        title="Tandem", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    _add_routes(app, Api(services))
    app.add_exception_handler(TandemError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_middleware(LastWord)  # the last one added is the outermost
    app.add_middleware(ApiKey, keys=services.settings.api_keys)
    app.add_middleware(HttpMetrics, metrics=services.metrics)
    app.add_middleware(RequestId)
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    def add(method: str, path: str, handler: Callable[..., Any], body: type[BaseModel] | None = None) -> None:
        extra: dict[str, Any] = {"requestBody": request_body(body)} if body else {}
        if "{name" in path:  # handlers take the request itself, so FastAPI does not see its parameters
            extra["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        app.add_api_route(path, handler, methods=[method], response_model=None, openapi_extra=extra)

    add("POST", "/v1/chat/completions", api.chat, ChatBody)
    add("POST", "/v1/completions", api.completions, CompletionBody)
    add("POST", "/tokenize", api.tokenize, TokenizeBody)
    add("POST", "/detokenize", api.detokenize, DetokenizeBody)
    add("GET", "/v1/models", api.models)
    add("GET", "/v1/models/{name:path}", api.model)  # names such as Qwen/Qwen3-0.6B have slashes
    add("GET", "/livez", api.live)
    add("GET", "/readyz", api.ready)
    add("GET", "/health", api.ready)
    add("GET", "/metrics", api.metrics)
    add("GET", "/version", api.version)
    add("GET", "/status", api.status)


async def _on_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, TandemError), "registered for TandemError only"
    return error_response(exc)


async def _on_http_exception(request: Request, exc: Exception) -> Response:
    """Starlette's own: no such route, or not with this method."""
    assert isinstance(exc, HTTPException), "registered for HTTPException only"
    if exc.status_code == 404:
        return error_response(NotFound(f"there is no {request.url.path[:128]} here"))
    if exc.status_code == 405:
        response = error_response(MethodNotAllowed(f"{request.method} is not what {request.url.path[:128]} takes"))
        response.headers.update(exc.headers or {})
        return response
    return error_response(InvalidRequest(str(exc.detail)))
