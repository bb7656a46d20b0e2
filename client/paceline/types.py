"""The values that go into a request and come out of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias, TypedDict

Message: TypeAlias = Mapping[str, str]
"""One turn of a conversation: `{"role": "user", "content": "Hello"}`."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""What to continue: text, token ids, or a conversation, oldest message first."""


class Options(TypedDict, total=False):
    """How a prompt is continued.

    What is left out or None has the default of the client, else that of the model, else that of the server.
    """

    n: int | None
    """Continuations to generate, 1 to 64; the prompt is computed once for all of them. Each draws its tokens for
    itself; greedy ones are equal. Default: 1."""

    max_output_tokens: int | None
    """Tokens to generate at most for each continuation, at least 1. Default: 256, or what the context length leaves."""

    temperature: float | None
    """Divides the logits, 0 to 100; 0 always takes the most likely token. Default: 0, unless the model samples."""

    top_k: int | None
    """Keeps the `top_k` most likely tokens; 0, the default, keeps all."""

    top_p: float | None
    """Keeps the most likely tokens whose probabilities together reach `top_p`, in (0, 1]. Default: 1, all."""

    min_p: float | None
    """Keeps tokens at least `min_p` times as likely as the most likely one, 0 to 1. Default: 0, all."""

    seed: int | None
    """Makes sampling repeatable, 0 to 2**64 - 1. Default: another one for each request."""

    stop: str | Sequence[str]
    """Texts that end the request, at most 16; the text you receive ends before the first of them."""

    stop_token_ids: Sequence[int]
    """Token ids that end the request beside those of the model, at most 64; the token itself is delivered."""

    ignore_eos: bool
    """Goes on where the model would end. For measurements."""

    priority: int | None
    """How urgent the request is among others, -1000 to 1000; the larger goes first. Only where the server runs the
    policy `priority`. Default: 0."""

    tenant: str | None
    """On whose behalf it runs, at most 128 printable ASCII characters without spaces. Where the server runs the policy
    `fair`, tenants with work waiting get equal service. Default: all such requests are one tenant."""

    cache_salt: str | None
    """Requests reuse what others with the same beginning have computed only if their salts are equal, so that nobody
    can find out by timing what others ask. At most 256 bytes of UTF-8. Default: shared with all requests without."""

    request_id: str | None
    """Id to cancel the request by and to find it in logs and traces: 1 to 128 printable ASCII characters without
    spaces. The same request sent again under the same id is not run again: its answer comes from the beginning, also to
    another process, while it runs and for a minute or so after. Default: a new one."""


class FinishReason(StrEnum):
    """Why a continuation ended."""

    STOP = "stop"  # the model ended its answer, or a stop text or stop token id came
    LENGTH = "length"  # max_output_tokens was reached


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request used, with all of its choices."""

    prompt_token_count: int
    output_token_count: int  # of all choices together
    queue_us: int  # from acceptance until an executor took the request
    first_token_us: int  # from acceptance until the first token
    total_us: int  # from acceptance until the end
    recomputation_count: int  # times the request gave its cache blocks back, or lost its executor, and was recomputed
    cached_prompt_token_count: int  # tokens of the prompt that were in the cache already and were not computed for it


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of the answer."""

    text: str  # new text; empty while a character or a possible stop text is incomplete
    token_ids: tuple[int, ...]  # new tokens; the last chunk of a choice includes the token that ended it
    finish_reason: FinishReason | None = None  # set in the last chunk of each choice only
    usage: Usage | None = None  # set in the last chunk only
    choice: int = 0  # which continuation this is a piece of; those of different choices come in any order


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Output:
    """The whole answer to one request."""

    request_id: str
    text: str  # this and the two below are those of choice 0
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    choices: tuple[Choice, ...]  # as many as `n` asked for, by index


@dataclass(frozen=True, slots=True)
class Model:
    """The model that a server serves, and its limits."""

    name: str
    context_length: int  # tokens of prompt and output together; 0 while no executor has joined
    vocabulary_size: int  # token ids are below it; 0 while no executor has joined
    end_token_ids: tuple[int, ...]  # with which the model ends its answer
    has_chat_template: bool  # whether `chat` works
    executor_count: int  # executors that serve it now
