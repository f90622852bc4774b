"""What requests say, checked, and how a refusal looks: OpenAI's shapes."""

import json
import math
from typing import Annotated, Any, TypeVar

import pydantic

from megatron_retro.config.model import RETRIEVAL_MODES
from megatron_retro.data.questions import Turn, dialog

_MOST_STOPS, _MOST_DOCUMENTS = 4, 1000

# Of OpenAI's fields, those that would change the answer and are not there: field -> values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None,),
    "presence_penalty": (None, 0),
    "suffix": (None, ""),
}
_UNSUPPORTED_IN_CHAT = {
    **_UNSUPPORTED,
    "functions": (None, []),
    "logprobs": (None, False),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
}

Request = TypeVar("Request", bound=pydantic.BaseModel)


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people; holds nothing of the machine.
        code: for programs.
        param: the field that is wrong.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def as_json(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("lone surrogates are no characters")
    return text


Characters = Annotated[str, pydantic.AfterValidator(_characters)]


class WritingRequest(pydantic.BaseModel):
    """What asks for text; fields that are not known are passed over."""

    model_config = pydantic.ConfigDict(strict=True)

    model: Characters | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: Characters | list[Characters] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    retrieval: Characters | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def check(self) -> None:
        """Check what does not depend on the model.

        Raises:
            Refusal: names the field.
        """
        bounds = {"max_tokens": (1, 10**9), "temperature": (0, 2), "top_p": (0, 1), "top_k": (0, 10**9)}
        for name, (least, most) in {**bounds, "n": (1, 128), "seed": (-(2**63), 2**63 - 1)}.items():
            value = getattr(self, name)
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                raise invalid(name, f"{name} must lie from {least} to {most}")
        if self.top_p == 0:
            raise invalid("top_p", "top_p must be above 0")
        if self.retrieval not in (None, *RETRIEVAL_MODES):
            raise invalid("retrieval", f"retrieval must be one of {', '.join(RETRIEVAL_MODES)}")
        if len(self.stops) > _MOST_STOPS or not all(self.stops):
            raise invalid("stop", f"stop takes up to {_MOST_STOPS} texts, none of them empty")
        if max(map(len, self.stops), default=0) > 1000:
            raise invalid("stop", "a stop text has at most 1000 characters")


class CompletionRequest(WritingRequest):
    """`POST /v1/completions`."""

    prompt: Characters | list[Characters]

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def check(self) -> None:
        super().check()
        if not self.prompts or not all(self.prompts):
            raise invalid("prompt", "a prompt is empty; give at least a word to go on from")


class Message(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    role: Characters
    content: Characters


class ChatRequest(WritingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message]
    ctxs: list[Characters] | None = None
    max_completion_tokens: int | None = None

    def check(self) -> None:
        self.max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        super().check()
        self.dialog("{question}")

    def dialog(self, template: str) -> tuple[list[Turn], str]:
        """What was said, and the prompt to answer.

        Raises:
            Refusal: the roles are not in turn, or the last one is no user.
        """
        try:
            turns, last = dialog([message.model_dump() for message in self.messages], template)
        except TypeError as error:
            raise invalid("messages", str(error)) from None
        if last is None:
            raise invalid("messages", "the last message is not a user's")
        return turns, last


class Document(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    text: Characters


class DocumentsRequest(pydantic.BaseModel):
    """`POST /v1/documents`: `{"documents": [{"text": …}, …]}`, or `{"text": …}` for one."""

    model_config = pydantic.ConfigDict(strict=True)

    documents: list[Document] | None = None
    text: Characters | None = None

    @property
    def texts(self) -> list[str]:
        """
        Raises:
            Refusal: there is none, too many, or an empty one.
        """
        texts = [document.text for document in self.documents or []] + ([self.text] if self.text is not None else [])
        if not texts:
            raise invalid("documents", 'give "documents", a list of {"text": …}, or "text"')
        if len(texts) > _MOST_DOCUMENTS:
            raise invalid("documents", f"at most {_MOST_DOCUMENTS} documents at a time")
        if not all(text.strip() for text in texts):
            raise invalid("documents", "a document is empty; give it a text")
        return texts


def read(body: bytes, kind: type[Request]) -> Request:
    """A body as a request.

    Raises:
        Refusal: it is not JSON, or a field has the wrong type.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not JSON", "invalid_json") from None
    if not isinstance(values, dict):
        raise Refusal(400, "the body must be a JSON object", "invalid_json")
    if issubclass(kind, WritingRequest):
        for name, neutral in (_UNSUPPORTED_IN_CHAT if kind is ChatRequest else _UNSUPPORTED).items():
            if not any(values.get(name) is value or values.get(name) == value for value in neutral):
                raise Refusal(400, f"{name} is not supported; leave it out", "unsupported_parameter", param=name)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise invalid(name, f"{name}: {first['msg']}") from None


def invalid(param: str, message: str) -> Refusal:
    return Refusal(400, message, "invalid_value", param=param)
