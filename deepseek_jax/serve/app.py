"""The routes."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serve.asked import as_messages, asked_by_chat, asked_by_completion, check_model, encoded
from deepseek_jax.serve.asking import Asker, LostError
from deepseek_jax.serve.config import ServeConfig
from deepseek_jax.serve.description import describe_limits
from deepseek_jax.serve.errors import ApiError, ErrorBody, add_handlers
from deepseek_jax.serve.meters import Counting, Meters
from deepseek_jax.serve.page import page
from deepseek_jax.serve.prompts import write_prompt
from deepseek_jax.serve.responding import Desk
from deepseek_jax.serve.responses import add_responses
from deepseek_jax.serve.schema import Chat, Completion, Detokenize, Tokenize
from deepseek_jax.serve.written import ChatForm, CompletionForm

_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "What is wrong with the request",
        401: "No key, or a wrong one",
        403: "A Host that is not served",
        404: "No such model",
        413: "A body that is too large",
        429: "Too many wait: come again after Retry-After seconds",
        503: "Loading, or about to end",
    }.items()
}


def make_app(asker: Asker, tokenizer: Tokenizer, config: ServeConfig) -> FastAPI:
    """The server around whoever answers ids with ids."""
    app = FastAPI(title="deepseek-jax", docs_url=None, redoc_url=None)
    add_handlers(app)
    app.state.desk = desk = Desk(asker, tokenizer, config, Meters())
    add_generation(app, desk)
    add_responses(app, desk, _REFUSED)
    add_models(app, desk)
    add_tokens(app, desk)
    describe_limits(app, desk)
    app.add_route("/", page, include_in_schema=False)
    app.add_middleware(Counting, meters=desk.meters)
    return app


def add_generation(app: FastAPI, desk: Desk) -> None:
    tokenizer, limits = desk.tokenizer, desk.config.limits

    @app.post("/v1/chat/completions", responses=_REFUSED)
    async def chat(body: Chat, request: Request) -> Response:
        """Answer the last message of a conversation."""
        desk.check()
        served = desk.asker.served
        asked = await asked_by_chat(body, tokenizer, served, limits)
        form = ChatForm(served.name, tokenizer, asked)
        return await desk.respond(request, asked, form, stream=bool(body.stream))

    @app.post("/v1/completions", responses=_REFUSED)
    async def completions(body: Completion, request: Request) -> Response:
        """Go on from prompts."""
        desk.check()
        served = desk.asker.served
        asked = await asked_by_completion(body, tokenizer, served, limits)
        form = CompletionForm(served.name, tokenizer, asked)
        return await desk.respond(request, asked, form, stream=bool(body.stream))


def add_models(app: FastAPI, desk: Desk) -> None:
    def described() -> dict[str, Any]:
        served = desk.asker.served
        facts = {"object": "model", "created": 0, "owned_by": "deepseek-jax", "max_model_len": served.context}
        return {"id": served.name, **facts}

    @app.get("/v1/models", responses=_REFUSED)
    async def models() -> Response:
        """The one there is."""
        desk.check()
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{model:path}", responses=_REFUSED)
    async def model(model: str) -> Response:
        desk.check()
        check_model(model, desk.asker.served)
        return JSONResponse(described())

    @app.get("/health", responses={503: {"description": "Loading, or about to end"}})
    async def health() -> Response:
        """Whether requests are taken on."""
        state = desk.asker.state
        return PlainTextResponse(f"{state}\n", 200 if state == "ready" else 503)

    @app.get("/metrics", responses=_REFUSED)
    async def metrics() -> Response:
        """For Prometheus."""
        try:
            engine = {} if desk.asker.state == "loading" else await desk.asker.metrics()
        except LostError as error:
            raise ApiError(503, str(error)) from error
        return Response(desk.meters.page(engine), media_type="text/plain; version=0.0.4")


def add_tokens(app: FastAPI, desk: Desk) -> None:
    tokenizer, limits = desk.tokenizer, desk.config.limits

    @app.post("/tokenize", responses=_REFUSED)
    async def tokenize(body: Tokenize) -> Response:
        """Ids of a text or of a conversation, as a completion or a chat would be asked by."""
        desk.check()
        check_model(body.model, desk.asker.served)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either a prompt or messages", param="prompt")

        def encode() -> list[int]:
            if body.messages is not None:
                return write_prompt(tokenizer, as_messages(body.messages, limits)).ids
            return [*(tokenizer.bos_ids if body.add_special_tokens else ()), *tokenizer.encode(body.prompt or "")]

        ids = await encoded(encode, "messages" if body.prompt is None else "prompt")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": desk.asker.served.context})

    @app.post("/detokenize", responses=_REFUSED)
    async def detokenize(body: Detokenize) -> Response:
        """The text of ids, special tokens spelled out."""
        desk.check()
        check_model(body.model, served := desk.asker.served)
        if (largest := max(body.tokens, default=0)) >= served.vocab_size:
            told = f"tokens has the id {largest}: expected below vocab_size={served.vocab_size}"
            raise ApiError(400, told, param="tokens")
        text = await encoded(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False), "tokens")
        return JSONResponse({"prompt": text})
