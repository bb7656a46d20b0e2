"""Builds the messages that a client sends.

Only what cannot be put into a message is refused here, as `InvalidRequest`; limits and meaning are for the server to
check, so that they live in one place.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping
from math import ceil, isfinite
from operator import index as as_integer
from reprlib import repr as shortened
from typing import Any, TypeGuard, cast
from uuid import uuid4

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message as ProtobufMessage

from paceline.errors import InvalidRequest
from paceline.types import Message, Prompt
from paceline.v1 import inference_pb2 as pb

_MAX_UINT32 = 2**32 - 1

_WANTED = {
    FieldDescriptor.CPPTYPE_FLOAT: "a number",
    FieldDescriptor.CPPTYPE_INT32: f"an integer from {-(2**31)} to {2**31 - 1}",
    FieldDescriptor.CPPTYPE_UINT32: f"an integer from 0 to {_MAX_UINT32}",
    FieldDescriptor.CPPTYPE_UINT64: f"an integer from 0 to {2**64 - 1}",
    FieldDescriptor.CPPTYPE_BOOL: "True or False",
}


def generate_request(
    prompt: Prompt | None = None,
    *,
    messages: str | Iterable[Message] | None = None,
    model: str | None = None,
    request_id: str | None = None,
    n: int | None = None,
    max_output_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    ignore_eos: bool = False,
    priority: int | None = None,
    tenant: str | None = None,
    cache_salt: str | None = None,
    detach_timeout_s: float | None = None,
) -> pb.GenerateRequest:
    """The message for one request, with a new id where the caller gave none; exactly one of `prompt`, `messages`."""
    request = pb.GenerateRequest(
        request_id=_text("request_id", request_id or new_request_id()),
        model=_text("model", model or ""),
        choice_count=_choice_count(n),
        tenant=_text("tenant", "" if tenant is None else tenant),
        cache_salt=_text("cache_salt", "" if cache_salt is None else cache_salt),
    )
    _set_prompt(request, prompt, messages)
    _set(request, priority=priority, detach_timeout_s=_whole_seconds(detach_timeout_s))
    _set(request.sampling, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    _set(request.stopping, max_output_tokens=max_output_tokens, ignore_eos=ignore_eos or None)
    for index, text in enumerate((stop,) if isinstance(stop, str) else _iterable("stop", stop, "texts")):
        request.stopping.stop.append(_text(f"stop[{index}]", text))
    if token_ids := unpacked(packed("stop_token_ids", stop_token_ids)):
        request.stopping.stop_token_ids.extend(token_ids)
    return request


def with_defaults(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, and `defaults` for what they leave out or have as None."""
    return {**defaults, **{name: value for name, value in options.items() if value is not None}}


def new_request_id() -> str:
    """An id that no other request has."""
    return f"req-{uuid4().hex}"


def packed(field: str, token_ids: Iterable[int]) -> bytes:
    """Token ids as the wire has them: little-endian uint32."""
    if isinstance(token_ids, (str, bytes, bytearray)):
        raise _invalid(
            f"{field} must be token ids, got {type(token_ids).__name__}; pass text as str, token ids as list"
        )
    ids = list(_iterable(field, token_ids, "token ids"))
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error:
        index, value = next((i, token) for i, token in enumerate(ids) if not _is_token_id(token))
        raise _invalid(f"{field}[{index}] must be an integer from 0 to {_MAX_UINT32}, got {shortened(value)}") from None


def unpacked(token_ids: bytes) -> tuple[int, ...]:
    """The token ids in a `bytes` field."""
    return struct.unpack(f"<{len(token_ids) // 4}I", token_ids)


def choice_count(request: pb.GenerateRequest) -> int:
    """How many continuations a request asks for."""
    return request.choice_count or 1


def _whole_seconds(value: float | None) -> float | None:
    """Rounded up, where it is a number of seconds at all; what is not is refused like any other value."""
    return ceil(value) if isinstance(value, float) and isfinite(value) else value


def _choice_count(n: int | None) -> int:
    """The field's value for `n`; 0 is unset, which asks for one continuation."""
    try:
        count = 1 if n is None else as_integer(n)
    except TypeError:
        count = 0
    if not 1 <= count <= _MAX_UINT32:
        raise _invalid(f"n must be a whole number of choices, at least 1, got {shortened(n)}")
    return 0 if count == 1 else count


def _is_token_id(value: object) -> bool:
    try:
        struct.pack("<I", value)
    except struct.error:
        return False
    return True


def _is_chat(prompt: object) -> TypeGuard[list[Message]]:
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt | None, messages: str | Iterable[Message] | None) -> None:
    if (prompt is None) == (messages is None):
        raise _invalid(
            f"a request needs either a prompt or messages, got {shortened(prompt)} and {shortened(messages)}"
        )
    if messages is not None:
        _set_chat(request, [{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
    elif isinstance(prompt, str):
        request.text = _text("prompt", prompt)
    elif _is_chat(prompt):
        _set_chat(request, prompt)
    else:
        request.token_ids.SetInParent()
        request.token_ids.ids = packed("prompt", cast(Iterable[int], prompt))


def _set_chat(request: pb.GenerateRequest, messages: Iterable[Message]) -> None:
    request.chat.SetInParent()
    for index, message in enumerate(_iterable("messages", messages, "messages")):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise _invalid(f"messages[{index}] must be a dict of 'role' and 'content', got {shortened(message)}")
        request.chat.messages.add(
            role=_text(f"messages[{index}]['role']", message["role"]),
            content=_text(f"messages[{index}]['content']", message["content"]),
        )


def _set(message: ProtobufMessage, **values: object) -> None:
    """Set the fields whose value is not None; the message itself stays unset when all are."""
    for field, value in values.items():
        if value is not None:
            try:
                setattr(message, field, value)
            except (TypeError, ValueError):
                wanted = _WANTED[message.DESCRIPTOR.fields_by_name[field].cpp_type]
                raise _invalid(f"{field} must be {wanted}, got {shortened(value)}") from None


def _text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _invalid(f"{field} must be a str, got {shortened(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start]
        raise _invalid(
            f"{field} has the lone surrogate {character!r} at position {error.start}, which UTF-8 cannot carry; "
            "decode the text with errors='replace'"
        ) from None
    return value


def _iterable(field: str, values: Iterable[Any], wanted: str) -> Iterator[Any]:
    try:
        return iter(values)
    except TypeError:
        raise _invalid(f"{field} must be a sequence of {wanted}, got {shortened(values)}") from None


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, grpc.StatusCode.INVALID_ARGUMENT)
