"""From text to token ids, and the pieces of text that token ids stand for.

What transformers does with the same files, without transformers: `encode` equals `tokenizer(text)`, `encode_chat`
equals `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from tokenizers import decoders, models, pre_tokenizers

from common.serving_folder import ServingFolder, ServingFolderError

_BYTES_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class ChatTemplateError(ValueError):
    """A conversation cannot be rendered: the model has no chat template, or its template refuses the messages."""


class Tokenizer:
    """A model's tokenizer and chat template.

    Text that spells a special token becomes that token, in prompts and in what a chat message says, as in
    transformers: whoever puts untrusted text into a message decides whether to take such spellings out first.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        template_variables: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may carry the padding and truncation of its training; prompts are served as they are.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._template_variables = dict(template_variables or {})
        self._template = None if chat_template is None else _compile(chat_template)
        self._special_ids = {
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
        self._byte_pieces = BytePieces(self) if self._decoder.get("type") == "ByteLevel" else None

    @classmethod
    def from_folder(cls, folder: ServingFolder) -> "Tokenizer":
        """Read the tokenizer of a model.

        Raises:
            ChatTemplateError: its chat template is not a valid template.
            ServingFolderError: its tokenizer cannot be read.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(folder.tokenizer_path))
        except Exception as error:  # tokenizers raises no type of its own
            raise ServingFolderError(
                f"'{folder.tokenizer_path}' is not a tokenizer ({error}); make the folder again with `paceline prepare`"
            ) from error
        return cls(
            backend,
            chat_template=folder.chat_template,
            template_variables=folder.special_tokens,
        )

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The tokenizer of `--model fake`: token id = byte, and `<|end|>` is 256."""
        characters = _character_of_byte()
        backend = tokenizers.Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<|end|>"])
        return cls(backend, chat_template=_BYTES_CHAT_TEMPLATE, template_variables={"eos_token": "<|end|>"})

    @property
    def vocabulary_size(self) -> int:
        """Token ids that have a text are below this number, unless the vocabulary has gaps."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` works."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that the tokenizer puts around a text.

        Other threads of Python run meanwhile: a batch, even one of one text, is encoded without the interpreter lock.
        """
        return self._backend.encode_batch([text])[0].ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the model answers.

        The template writes every special token itself; none is added to them.

        Raises:
            ChatTemplateError: there is no template, or it refuses these messages.
        """
        return self._backend.encode_batch([self.render_chat(messages)], add_special_tokens=False)[0].ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of a conversation up to where the model answers."""
        if self._template is None:
            raise ChatTemplateError("this model has no chat template; send the prompt as text instead")
        variables = {**self._template_variables, "messages": messages, "tools": None, "documents": None}
        try:
            return self._template.render(variables, add_generation_prompt=True)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    # --- What incremental decoding needs to know ---

    def without_text(self, token_id: int) -> bool:
        """Whether decoding leaves `token_id` out: it is special, or the tokenizer does not know it."""
        return token_id in self._special_ids or self._backend.id_to_token(token_id) is None

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of `token_id`; None for an id it does not have."""
        return self._backend.id_to_token(token_id)

    @property
    def byte_pieces(self) -> "BytePieces | None":
        """The bytes that each token id adds to the text, whatever stands before it.

        None where the text of a token depends on its neighbours: every tokenizer but byte-level BPE.
        """
        return self._byte_pieces

    @property
    def has_byte_fallback(self) -> bool:
        """Whether tokens such as `<0xE2>` stand for single bytes."""
        return any(part.get("type") == "ByteFallback" for part in (self._decoder, *self._decoder.get("decoders", ())))


class BytePieces(dict[int, bytes]):
    """Bytes of a byte-level token by its id, worked out at first use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._byte_of_character = {character: byte for byte, character in enumerate(_character_of_byte())}

    def __missing__(self, token_id: int) -> bytes:
        token = self._tokenizer.token(token_id)
        if token is None or self._tokenizer.without_text(token_id):
            piece = b""
        else:
            try:
                piece = bytes(self._byte_of_character[character] for character in token)
            except KeyError:  # a token added as plain text, as the decoder in `tokenizers` sees it
                piece = token.encode()
        self[token_id] = piece
        return piece


def _character_of_byte() -> list[str]:
    """How byte-level BPE spells each byte: printable Latin-1 as itself, the others from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


# --- Chat templates, with what templates on the hub rely on ---


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's words for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict(…)` without the attributes of the type, by which a template could leave the sandbox."""

    def __call__(self, *items: Any, **named: Any) -> dict[Any, Any]:
        return dict(*items, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace(…)` without names that begin with an underscore, for the same reason."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # like jinja2's own, so that `namespace(self=…)` works
        self, items = args[0], dict(*args[1:], **kwargs)
        for name in items:
            _check_name(name)
        Namespace.__init__(self, items)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace of a chat template cannot have the attribute {name!r}; rename it"
        )


def _compile(chat_template: str) -> jinja2.Template:
    # Whoever made the model wrote the template, and the scheduler runs it: hence the sandbox.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(chat_template)
    except jinja2.TemplateError as error:
        raise ChatTemplateError(
            f"chat_template.jinja is not a valid template: {error}; repair it or take it out"
        ) from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As transformers has it: without the escapes for HTML that jinja2 puts in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
