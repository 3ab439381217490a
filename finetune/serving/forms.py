"""What requests may say. What isn't named here is ignored and reported in a header, as clients send much more."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetune.config.rules import LARGEST_SEED
from finetune.data.text.formats import Message
from finetune.serving.requests import Refused

MOST_TURNS, MOST_STOPS, LONGEST_STOP = 1000, 16, 200  # texts are limited by the size of a request
Number = Annotated[float, Field(allow_inf_nan=False)]


class Form(BaseModel):
    """A body of which all is kept, so that what is ignored can be named."""

    model_config = ConfigDict(extra="allow")

    def ignored(self) -> list[str]:
        """Fields that have a value and no meaning here."""
        return sorted(name for name, value in (self.model_extra or {}).items() if value not in (None, [], {}, "", 0))


class StreamOptions(Form):
    """Of OpenAI."""

    include_usage: bool = False


class Sampling(Form):
    """How a reply is drawn; what is None is as the server's configuration says."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None

    def stops(self) -> tuple[str, ...]:
        """Texts before which the reply ends. Raises Refused for too many, an empty or a very long one."""
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(found) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in found):
            raise Refused(
                400,
                f"stop takes at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters",
                code="invalid_value",
                param="stop",
            )
        return found

    def require_one(self) -> None:
        """Raises Refused where several replies to one prompt are asked for."""
        if self.n not in (None, 1):
            raise Refused(400, f"n={self.n} is not supported; ask once for each reply", code="invalid_value", param="n")


class Part(Form):
    """A piece of a message's content."""

    type: str
    text: str | None = None


class Turn(Form):
    """A message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def message(self, index: int) -> Message:
        """As chat templates take it. Raises Refused for content that is no text."""
        parts = self.content if isinstance(self.content, list) else [Part(type="text", text=self.content or "")]
        if odd := next((part.type for part in parts if part.type != "text"), None):
            raise Refused(
                400,
                f"messages[{index}] has content of type {odd}, and this model reads text alone",
                code="unsupported_content",
                param="messages",
            )
        role = "system" if self.role == "developer" else self.role
        return Message(role, "\n".join(part.text or "" for part in parts))


class ChatCompletion(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=MOST_TURNS)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None


class Completion(Sampling):
    """Body of /v1/completions. prompt: a text, one text in a list, or token ids."""

    prompt: str | list[str] | list[int]


class Chat(Form):
    """Body of /chat. history: earlier questions with their answers."""

    prompt: str
    history: Annotated[list[tuple[str, str]], Field(max_length=MOST_TURNS)] = []
    model: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None

    def messages(self) -> list[Message]:
        """The whole conversation."""
        turns = [turn for asked, said in self.history for turn in (Message("user", asked), Message("assistant", said))]
        return [*turns, Message("user", self.prompt)]

    def sampling(self) -> Sampling:
        """The same settings under OpenAI's names."""
        return Sampling(
            model=self.model,
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


def described(problems: list[Any]) -> tuple[str, str]:
    """pydantic's problems as one line, and the field of the first."""
    lines = [f"{_place(problem)}: {problem['msg']}" for problem in problems]
    return "; ".join(lines[:3])[:1000], _place(problems[0])


def _place(problem: Any) -> str:
    return ".".join(str(part) for part in problem["loc"] if part not in ("body", "query")) or "body"
