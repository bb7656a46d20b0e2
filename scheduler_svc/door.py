"""The door: what users send becomes a request, or is refused with the value, the limit and the way out."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import grpc

from common.errors import RefusedError, invalid, shown
from common.spans import messages_json
from paceline.v1 import inference_pb2 as pb
from paceline.v1 import sampling_pb2
from scheduler_svc.answers import Terms
from scheduler_svc.config import SchedulerConfig
from scheduler_svc.core.request import Request, Sampling, TraceContext, with_choices
from scheduler_svc.fleet import ModelLimits
from scheduler_svc.refusals import no_executor, too_large
from scheduler_svc.text_stream import TextStream
from scheduler_svc.tokenizer import ChatTemplateError, Tokenizer

DEFAULT_OUTPUT_TOKENS = 256
MAX_TEMPERATURE = 100.0
MAX_CHOICES = 64
MAX_PRIORITY = 1000
MAX_SALT_BYTES = 256
MAX_STOPS, MAX_STOP_BYTES, MAX_STOP_TOKEN_IDS = 16, 256, 64
MAX_CHAT_MESSAGES = 4096
_FILTERS = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # each with the value that keeps all tokens
MAX_DETACH_TIMEOUT_S = 3600
_NAME = re.compile(r"[!-~]{1,128}")


class Door:
    """Checks and tokenizes what users send. Nothing that it refuses reaches the core."""

    def __init__(
        self, config: SchedulerConfig, model_name: str, tokenizer: Tokenizer, defaults: dict[str, Any]
    ) -> None:
        """Stand before `model_name`; `defaults` are the sampling parameters of its generation_config.json."""
        self._config = config
        self.model_name = model_name
        self._tokenizer = tokenizer
        self._defaults = sampling_defaults(defaults)
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def request(
        self,
        message: pb.GenerateRequest,
        request_id: str,
        limits: ModelLimits | None,
        deadline: float,
        trace: TraceContext | None,
        method: str = "Generate",
    ) -> tuple[Request, list[TextStream], Terms]:
        """Make a request of the message, and a stream of text for each of its choices. Raises `RefusedError`."""
        if limits is None:
            raise no_executor()
        self._check_model(message)
        sampling = self._sampling(message.sampling)
        _check_stops(message.stopping.stop)
        _check_placing(message)
        stop_token_ids = _stop_token_ids(message.stopping, limits)
        self._check_prompt(message, limits)
        loop = asyncio.get_running_loop()
        prompt, texts = await loop.run_in_executor(self._threads, self._read, message)
        _check_length(message, len(prompt), limits)
        request = Request(
            request_id=request_id,
            token_ids=prompt,
            prompt_count=len(prompt),
            max_output_count=_max_output_count(message.stopping, len(prompt), limits),
            sampling=sampling,
            stop_token_ids=stop_token_ids,
            deadline=deadline,
            length_is_bounded=message.stopping.HasField("max_output_tokens"),
            priority=message.priority,
            tenant=message.tenant,
            cache_salt=message.cache_salt,
            trace=trace,
        )
        terms = Terms(
            content_hash(message),
            tuple(message.stopping.stop),
            message.detach_timeout_s,
            bool(message.request_id),
            operation=operation_of(message),
            method=method,
            prompt_json=_prompt_json(message) if self._config.trace_content else "",
        )
        return with_choices(request, len(texts)), texts, terms

    def _read(self, message: pb.GenerateRequest) -> tuple[array[int], list[TextStream]]:
        """Token ids of the prompt, and a stream for the text of each choice. Runs beside the event loop."""
        kind = message.WhichOneof("prompt")
        try:
            if kind == "text":
                token_ids = array("I", self._tokenizer.encode(message.text))
            elif kind == "chat":
                messages = [{"role": entry.role, "content": entry.content} for entry in message.chat.messages]
                token_ids = array("I", self._tokenizer.encode_chat(messages))
            else:
                token_ids = array("I", message.token_ids.ids)
        except ChatTemplateError as error:
            raise invalid(f"the chat template of '{self.model_name}' refuses these messages: {error}") from error
        stops = tuple(message.stopping.stop)
        return token_ids, [TextStream(self._tokenizer, stops) for _ in range(message.choice_count or 1)]

    def _check_model(self, message: pb.GenerateRequest) -> None:
        if message.model and message.model != self.model_name:
            raise RefusedError(
                grpc.StatusCode.NOT_FOUND,
                f"model '{shown(message.model)}' is not served here; this server has '{self.model_name}'",
            )

    def _check_prompt(self, message: pb.GenerateRequest, limits: ModelLimits) -> None:
        """What can be said about the prompt before it is tokenized. Cheap, however large it is."""
        kind = message.WhichOneof("prompt")
        if kind is None:
            raise invalid("prompt is missing; set one of text, token_ids and chat")
        if kind == "token_ids":
            _check_given_token_ids(message.token_ids.ids, limits)
            return
        size = len(message.text.encode()) if kind == "text" else message.chat.ByteSize()
        if size > self._config.max_prompt_bytes:
            raise too_large(
                f"{kind} has {size} bytes, the limit is {self._config.max_prompt_bytes}; the context length is "
                f"{limits.context_length} tokens in any case: shorten it"
            )
        if kind == "chat":
            self._check_chat(message.chat)

    def _check_chat(self, chat: pb.ChatMessages) -> None:
        if not self._tokenizer.has_chat_template:
            raise invalid(f"model '{self.model_name}' has no chat template; send text or token_ids instead of chat")
        if not 1 <= len(chat.messages) <= MAX_CHAT_MESSAGES:
            raise invalid(f"chat has {len(chat.messages)} messages, must have 1 to {MAX_CHAT_MESSAGES}")
        for position, message in enumerate(chat.messages):
            if not message.role:
                raise invalid(f"chat message {position} has no role; use system, user or assistant")

    def _sampling(self, given: sampling_pb2.SamplingParams) -> Sampling:
        values = {
            name: getattr(given, name) if _is_set(given, name) else default for name, default in self._defaults.items()
        }
        filters = [name for name, off in _FILTERS.items() if _is_set(given, name) and getattr(given, name) != off]
        if filters and values["temperature"] == 0:
            if given.HasField("temperature"):
                raise invalid(
                    f"{filters[0]} is {getattr(given, filters[0]):g} but temperature is 0, which takes the most likely "
                    f"token whatever {filters[0]} says; leave one of them out"
                )
            values["temperature"] = 1.0  # who asks for a filter asks for sampling
        check_sampling(values)
        seed = given.seed if given.HasField("seed") else secrets.randbits(64)
        return Sampling(seed=seed, **values)


def request_id_of(message: pb.GenerateRequest) -> str:
    """The id that the caller chose, or a new one. Raises `RefusedError`."""
    if message.request_id and not _NAME.fullmatch(message.request_id):
        raise invalid(
            f"request_id '{shown(message.request_id)}' must be 1 to 128 printable ASCII characters without spaces"
        )
    return message.request_id or f"req-{secrets.token_hex(12)}"


def operation_of(message: pb.GenerateRequest) -> str:
    """What is asked for, as traces name it."""
    return "chat" if message.HasField("chat") else "text_completion"


def content_hash(message: pb.GenerateRequest) -> bytes:
    """What makes a repeated request the same one: everything but who reads it from where, and for how long."""
    content = pb.GenerateRequest()
    content.CopyFrom(message)
    for name in ("request_id", "resume_from", "detach_timeout_s"):
        content.ClearField(name)
    return blake2b(content.SerializeToString(deterministic=True), digest_size=16).digest()


def positions_of(message: pb.GenerateRequest) -> dict[int, tuple[int, int]]:
    """(tokens, code points) that the caller has, by choice. Raises `RefusedError`."""
    positions = {place.choice: (place.output_token_count, place.text_length) for place in message.resume_from}
    if len(positions) < len(message.resume_from):
        raise invalid(f"resume_from has {len(message.resume_from)} entries for {len(positions)} choices; send one each")
    return positions


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """The model's own sampling parameters: greedy unless its generation_config.json says to sample.

    Raises `ValueError` when it says something that no request could say.
    """
    values: dict[str, Any] = {"temperature": 0.0, **_FILTERS}
    if not generation_config.get("do_sample"):
        return values
    values["temperature"] = 1.0
    for name in values:
        own = generation_config.get(name)
        if own is None:
            continue
        if isinstance(own, bool) or not isinstance(own, int | float):
            raise ValueError(f"generation_config.json: {name} is {own!r}, must be a number; correct it or take it out")
        values[name] = own
    values["top_k"] = max(0, int(values["top_k"]))  # -1 is another way to say that it is off
    try:
        check_sampling(values)
    except RefusedError as error:
        raise ValueError(f"generation_config.json: {error.message}") from error
    return values


def check_sampling(values: dict[str, Any]) -> None:
    """Refuse sampling parameters that are out of range."""
    _check_range("temperature", values["temperature"], 0.0, MAX_TEMPERATURE, "0 is greedy")
    _check_range("min_p", values["min_p"], 0.0, 1.0, "0 keeps all tokens")
    if not 0.0 < values["top_p"] <= 1.0:  # NaN is refused here too
        raise invalid(f"top_p is {values['top_p']:g}, must be above 0 and at most 1; 1 keeps all tokens")


def _check_placing(message: pb.GenerateRequest) -> None:
    """What says when and where the request runs."""
    if message.choice_count > MAX_CHOICES:
        raise invalid(f"choice_count (n) is {message.choice_count}, at most {MAX_CHOICES} are possible")
    if abs(message.priority) > MAX_PRIORITY:
        raise invalid(
            f"priority is {message.priority}, must be {-MAX_PRIORITY} to {MAX_PRIORITY}; the larger goes first"
        )
    if message.tenant and not _NAME.fullmatch(message.tenant):
        raise invalid(f"tenant '{shown(message.tenant)}' must be 1 to 128 printable ASCII characters without spaces")
    if message.detach_timeout_s > MAX_DETACH_TIMEOUT_S:
        raise invalid(f"detach_timeout_s is {message.detach_timeout_s}, at most {MAX_DETACH_TIMEOUT_S} are possible")
    if message.detach_timeout_s and not message.request_id:
        raise invalid(
            f"detach_timeout_s is {message.detach_timeout_s}, but without a request_id nobody could come back; set one"
        )
    size = len(message.cache_salt.encode())
    if size > MAX_SALT_BYTES:
        raise invalid(f"cache_salt has {size} bytes, at most {MAX_SALT_BYTES} are possible; send a hash of it")


def _stop_token_ids(stopping: sampling_pb2.StopConditions, limits: ModelLimits) -> frozenset[int]:
    given = stopping.stop_token_ids
    if len(given) > MAX_STOP_TOKEN_IDS:
        raise invalid(f"stop_token_ids has {len(given)} entries, at most {MAX_STOP_TOKEN_IDS} are possible")
    _check_token_ids("stop_token_ids", given, limits.vocabulary_size)
    return frozenset(given) | (frozenset() if stopping.ignore_eos else frozenset(limits.end_token_ids))


def _check_length(message: pb.GenerateRequest, prompt_count: int, limits: ModelLimits) -> None:
    """Refuse a prompt without a token, or without room for an answer."""
    if not prompt_count:
        kind = message.WhichOneof("prompt")
        raise invalid(f"{kind} gives an empty prompt; the model needs at least one token to continue")
    if prompt_count >= limits.context_length:
        raise too_large(
            f"the prompt has {prompt_count} tokens but the context length of the model is "
            f"{limits.context_length}, prompt and output together; shorten the prompt"
        )


def _check_given_token_ids(data: bytes, limits: ModelLimits) -> None:
    if len(data) % 4:
        raise invalid(f"token_ids has {len(data)} bytes, which is not a whole number of little-endian uint32")
    if len(data) // 4 >= limits.context_length:
        raise too_large(
            f"token_ids has {len(data) // 4} tokens but the context length of the model is {limits.context_length}, "
            f"prompt and output together; shorten the prompt"
        )
    _check_token_ids("token_ids", array("I", data), limits.vocabulary_size)


def _check_token_ids(field: str, token_ids: Sequence[int], vocabulary_size: int) -> None:
    largest = max(token_ids, default=0)
    if largest >= vocabulary_size:
        raise invalid(f"{field} contains {largest}, but the vocabulary ends at {vocabulary_size - 1}")


def _check_range(field: str, value: float, low: float, high: float, hint: str) -> None:
    if not low <= value <= high or math.isnan(value):
        raise invalid(f"{field} is {value:g}, must be {low:g} to {high:g}; {hint}")


def _is_set(given: sampling_pb2.SamplingParams, name: str) -> bool:
    return given.HasField(name)  # type: ignore[arg-type]  # one of its optional fields


def _check_stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop has {len(stops)} texts, at most {MAX_STOPS} are possible")
    for position, stop in enumerate(stops):
        size = len(stop.encode())
        if not 1 <= size <= MAX_STOP_BYTES:
            raise invalid(f"stop[{position}] has {size} bytes, must be 1 to {MAX_STOP_BYTES}")


def _max_output_count(stopping: sampling_pb2.StopConditions, prompt_count: int, limits: ModelLimits) -> int:
    room = limits.context_length - prompt_count
    if not stopping.HasField("max_output_tokens"):
        return min(DEFAULT_OUTPUT_TOKENS, room)
    wanted = stopping.max_output_tokens
    if wanted < 1:
        raise invalid("max_output_tokens is 0, must be at least 1; leave it out for the default")
    if wanted > room:
        raise too_large(
            f"max_output_tokens is {wanted}, but the prompt has {prompt_count} tokens and the context length is "
            f"{limits.context_length}, prompt and output together; ask for at most {room}"
        )
    return wanted


def _prompt_json(message: pb.GenerateRequest) -> str:
    """The prompt as the messages of a GenAI span, as far as that takes them; token ids stay what they are."""
    if message.HasField("chat"):
        said = [(entry.role, entry.content) for entry in message.chat.messages]
    elif message.HasField("text"):
        said = [("user", message.text)]
    else:
        said = [("user", f"{len(message.token_ids.ids)} token ids")]
    return messages_json(said)
