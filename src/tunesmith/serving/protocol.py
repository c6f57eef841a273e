"""Requests and replies of the OpenAI interface, with a bound on every number, list and text.

A field that is not known is refused rather than passed over: an answer must not leave out in silence what was
asked for. Fields of OpenAI and vLLM that would change the answer and are not built are known with their
neutral value alone.
"""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tunesmith.data.conversation import MAX_MESSAGES
from tunesmith.data.problems import BrokenRule, closest, shorten
from tunesmith.data.strict_json import parse_json
from tunesmith.serving.faults import Refusal, bad_request

NAME = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
MAX_NAME = 256
MAX_BODY_BYTES = 4 * 2**20
MAX_CHARACTERS = 1_000_000  # of a prompt; its tokens are counted against the context afterwards
MAX_PROMPTS = 64
MAX_PROMPT_TOKENS = 1_000_000
MAX_CHOICES = 16
MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASES = 1_024
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
MAX_METADATA = 16
DEFAULT_COMPLETION_TOKENS = 16  # as at OpenAI
_SEED = 2**63

Name = Annotated[str, Field(pattern=NAME, max_length=MAX_NAME)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
_Short = Annotated[str, Field(max_length=512)]


def _whole(value: object) -> object:
    # JSON has one kind of number, and clients write 1.0; a text or true is no number.
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = BeforeValidator(_whole)
Choices = Annotated[int, Field(ge=1, le=MAX_CHOICES), _Whole]
Seed = Annotated[int, Field(ge=-_SEED, lt=_SEED), _Whole]
Length = Annotated[int, Field(ge=1, le=MAX_TOKENS), _Whole]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), _Whole]
Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[_Short, Bias], Field(max_length=MAX_BIASES)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Body):
    """What a stream tells besides the text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class JsonSchema(_Body):
    """A schema by OpenAI's rules; it is held to whatever ``strict`` says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    """The form an answer has to have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type json_schema, and with no other")
        return self


class NamedFunction(_Body):
    """The name of a tool."""

    name: _Short


class NamedTool(_Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class SamplingFields(_Body):
    """What both kinds of request say about how tokens are chosen."""

    model: Name
    n: Choices = 1
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Seed | None = None
    stop: Stop | Stops | None = None
    logit_bias: Biases | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    user: _Short | None = None
    response_format: ResponseFormat | None = None
    # Neutral values alone.
    best_of: Literal[1] | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Zero | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    repetition_penalty: One | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.wants_json and self.ignore_eos:
            raise ValueError("response_format: an answer of this form has an end; leave out ignore_eos")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream; leave it out")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The request's own stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_json(self) -> bool:
        """Whether answers are held to JSON."""
        return self.response_format is not None and self.response_format.type != "text"

    def biases(self) -> dict[int, float]:
        """``logit_bias`` by token id.

        Raises:
            Refusal: 400: a key is no token id.
        """
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdigit() and len(key) <= 10):
                raise bad_request(f"logit_bias: {shorten(key)} is no token id", "logit_bias")
        return {int(key): value for key, value in (self.logit_bias or {}).items()}


class ChatRequest(SamplingFields):
    """``POST /v1/chat/completions``; messages are checked by the rules of training rows."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool = False
    top_logprobs: TopLogprobs | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: Annotated[dict[_Short, _Short], Field(max_length=MAX_METADATA)] | None = None

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs; set logprobs to true")
        if self.must_call and not self.tools:
            raise ValueError("tool_choice: there are no tools to choose from; send tools")
        if self.must_call and self.ignore_eos:
            raise ValueError("tool_choice: a call has an end; leave out ignore_eos")
        if self.wants_json and self.tools and self.tool_choice != "none":
            raise ValueError(
                "response_format: an answer has this form or calls tools; leave out one, or set tool_choice to none"
            )
        return self

    @property
    def must_call(self) -> bool:
        """Whether an answer has to call a tool."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def may_call(self) -> bool:
        """Whether an answer may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def most_tokens(self) -> int | None:
        """Tokens the answer may have; None: as many as the context holds."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``; a prompt is text or token ids, or several of either."""

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[list[Token], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: Length | None = DEFAULT_COMPLETION_TOKENS
    logprobs: TopLogprobs | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens the answer may have."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """As of ``ChatRequest``."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt as it was given."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[int(item) for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]


class LoadRequest(_Body):
    """``POST /v1/load_lora_adapter``, vLLM's; the path is inside the loading path, by default the name."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=1_024)] | None = None
    load_inplace: bool = False  # vLLM's; here a name may always be loaded again, as a new version


class UnloadRequest(_Body):
    """``POST /v1/unload_lora_adapter``, vLLM's."""

    lora_name: Name
    lora_int_id: Seed | None = None  # vLLM's; the name alone decides


RequestType = TypeVar("RequestType", bound=_Body)

# Of a field that may be several things a list of what each of them lacks would be no help.
_MANIFOLD = {
    "stop": f"must be a text of 1 to {MAX_STOP_CHARACTERS} characters, or at most {MAX_STOPS} such texts",
    "prompt": f"must be a text of at most {MAX_CHARACTERS:,} characters, a list of token ids, or a list of at most "
    f"{MAX_PROMPTS} of either",
    "tool_choice": "must be none, auto, required, or one tool by its name",
}
_TEMPLATE_FIELDS = ("chat_template", "chat_template_kwargs")


def parse_request(kind: type[RequestType], body: bytes) -> RequestType:
    """The request in a body of JSON.

    Raises:
        Refusal: 400, naming the field at fault.
    """
    try:
        value = parse_json(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise bad_request("The body is not UTF-8", code="invalid_json") from None
    except BrokenRule as broken:
        raise bad_request(f"The body is not JSON: {broken.rule}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object", code="invalid_json")
    for name in _TEMPLATE_FIELDS:
        if name in value:
            raise bad_request(f"{name}: a request cannot bring a chat template; leave it out", name)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _refusal(kind: type[BaseModel], error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    param = path[0] if path else None
    if first["type"] == "extra_forbidden" and param is not None:
        near = closest(path[-1], kind.model_fields) if len(path) == 1 else None
        hint = f"closest is {near}" if near else "leave it out"
        return bad_request(
            f"{shorten(path[-1])}: is not supported; {hint}", shorten(param), "unknown_parameter"
        )
    message = first["msg"].removeprefix("Value error, ")
    if param is None:
        param = message.partition(":")[0] if ":" in message else None
        return bad_request(message, param)
    if first["type"] == "missing":
        return bad_request(f"{param}: is missing", param, "missing_parameter")
    if param in _MANIFOLD:
        return bad_request(f"{param}: {_MANIFOLD[param]}", param)
    return bad_request(f"{'.'.join(map(shorten, path))}: {message}", param)


# Replies

Finish = Literal["stop", "length", "tool_calls"]


class Model(BaseModel):
    """One model in ``GET /v1/models``; ``parent`` is the base of an adapter, ``root`` what it is made of.

    ``loaded``: whether it is in memory; one that is not is loaded when it is asked for.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["tunesmith"] = "tunesmith"
    root: str
    parent: str | None
    max_model_len: int
    loaded: bool


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class Usage(BaseModel):
    """Tokens of a request; a stop token counts as generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token that could have stood at a place; ``bytes`` is null where it is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the older form; ``text_offset`` counts characters of the answer."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float]] | None


class CalledFunction(BaseModel):
    """What an answer calls; ``arguments`` is the JSON text of an object."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolCallDelta(ToolCall):
    """A call in a stream, whole in one event; ``index`` is its place among the answer's calls."""

    index: int


class ChatMessage(BaseModel):
    """An answer; ``content`` is null where there is nothing but calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer to a chat, whole."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatDelta(BaseModel):
    """One answer to a chat, what is new of it."""

    index: int
    delta: dict[Literal["role", "content", "tool_calls"], str | list[ToolCallDelta]]
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class CompletionChoice(BaseModel):
    """One continuation of a prompt, whole or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """``POST /v1/chat/completions``, and with ``ChatDelta`` each event of its stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatDelta]
    usage: Usage | None = None
    system_fingerprint: str | None = None


class Completion(BaseModel):
    """``POST /v1/completions``, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
