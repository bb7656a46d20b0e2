import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from common.serving_folder import ServingFolder
from scheduler_svc.tokenizer import ChatTemplateError, Tokenizer

SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
    "' + message['content'] + '<|im_end|>' + '\n"
    "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
    "' }}{% endif %}"
)

# What templates on the hub use beyond plain Jinja.
DEMANDING_TEMPLATE = """
{%- set state = namespace(seen=0, self=1) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'stop' %}
        {%- break %}
    {%- endif %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('Only user and assistant roles are supported, got ' + message.role) }}
    {%- endif %}
    {%- set state.seen = state.seen + 1 %}
    {%- generation %}
    {{- message | tojson(indent=2) }}
    {%- endgeneration %}
    {%- if tools is not none %}tools{% endif %}
{%- endfor %}
{{- state.seen }}{{ strftime_now('%Y') | length }}{{ dict(a='<é>') | tojson }}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}
"""

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "<b>naïve</b> & 'quotes'"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "👩‍👩‍👧‍👦\n\n  x"},
    ],
    [{"role": "user", "content": "says <|im_end|> itself"}],
]


def backend() -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose post-processor begins every text with `<|im_start|>`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 256)]
    )
    return made


def serving_folder(path: Path, template: str | None) -> ServingFolder:
    backend().save(str(path / "tokenizer.json"))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    named = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (path / "special_tokens_map.json").write_text(json.dumps(named))
    return ServingFolder(path, "tiny", "00")


@pytest.mark.parametrize("template", [SMOLLM2_TEMPLATE, DEMANDING_TEMPLATE], ids=["smollm2", "demanding"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["short", "long", "spells a special token"])
def test_a_conversation_becomes_the_tokens_that_transformers_makes_of_it(tmp_path: Path, template, messages):
    """A model answers well only to the very prompt it was trained on; one special token too many spoils it."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
    )
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    assert Tokenizer.from_folder(serving_folder(tmp_path, template)).encode_chat(messages) == expected


def test_a_text_prompt_gets_the_special_tokens_of_the_tokenizer_once(tmp_path: Path):
    """Models that expect a begin token before plain text get it; in a conversation the template has written it."""
    tokenizer = Tokenizer.from_folder(serving_folder(tmp_path, "{{ bos_token }}hi"))

    assert tokenizer.encode("hi") == [256, *tokenizer.encode_chat([])[1:]]
    assert tokenizer.encode_chat([]).count(256) == 1


def test_a_long_prompt_is_not_cut_and_a_short_one_not_filled_up(tmp_path: Path):
    """A tokenizer.json may carry the truncation and padding of its training, which would change prompts silently."""
    folder = serving_folder(tmp_path, None)
    trained = backend()
    trained.enable_truncation(8)
    trained.enable_padding(length=16)
    trained.save(str(folder.tokenizer_path))

    assert len(Tokenizer.from_folder(folder).encode("x")) == 2
    assert len(Tokenizer.from_folder(folder).encode("x" * 20)) == 21


def test_the_reason_of_a_refusing_template_reaches_the_caller(tmp_path: Path):
    """Which roles a model knows is written only in its template; the user needs its own words to fix the request."""
    tokenizer = Tokenizer.from_folder(serving_folder(tmp_path, DEMANDING_TEMPLATE))

    with pytest.raises(ChatTemplateError, match="Only user and assistant roles are supported, got system"):
        tokenizer.encode_chat([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize(
    "template", ["{{ messages[3].content }}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}"]
)
def test_a_template_that_stumbles_over_the_messages_is_the_users_error(tmp_path: Path, template: str):
    """Any failure inside a template is answered as a bad request and must not take the scheduler with it."""
    tokenizer = Tokenizer.from_folder(serving_folder(tmp_path, template))

    with pytest.raises(ChatTemplateError, match="chat template refuses"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ dict.__call__.__globals__ }}", "{{ namespace(__init__=1) }}"]
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, template: str):
    """The template comes with the model, from whoever made that; it may format text and nothing else."""
    with pytest.raises(ChatTemplateError, match=r"unsafe|attribute"):
        Tokenizer.from_folder(serving_folder(tmp_path, template)).encode_chat([])


def test_a_broken_template_is_found_at_start(tmp_path: Path):
    """The operator can repair it; a user who meets it in a request cannot."""
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja is not a valid template"):
        Tokenizer.from_folder(serving_folder(tmp_path, "{% for %}"))


def test_a_model_without_template_says_how_to_ask_it(tmp_path: Path):
    """Base models take text prompts."""
    tokenizer = Tokenizer.from_folder(serving_folder(tmp_path, None))

    assert not tokenizer.has_chat_template
    with pytest.raises(ChatTemplateError, match="no chat template; send the prompt as text"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])


@given(st.text())
def test_the_built_in_tokenizer_is_the_bytes_of_the_text(text: str):
    """Tests with fake executors can work out prompts and answers by hand."""
    tokenizer = Tokenizer.bytes()
    plain = text.replace("<|end|>", "")

    assert tokenizer.encode(plain) == list(plain.encode())
    assert tokenizer.decode([*plain.encode(), 256]) == plain


def test_the_built_in_tokenizer_decodes_any_byte():
    """A fake model's tokens are hashes: any id below the vocabulary size may come, in any order."""
    tokenizer = Tokenizer.bytes()

    assert tokenizer.vocabulary_size == 257
    for first in range(257):
        ids = [first, 0xC3, first]
        expected = b"".join(bytes([number]) for number in ids if number < 256).decode(errors="replace")
        assert tokenizer.decode(ids) == expected


def test_the_built_in_tokenizer_has_a_chat_template_and_an_end_token():
    """The whole public API works against a fake executor, chat and end of sequence included."""
    tokenizer = Tokenizer.bytes()

    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "hi"}])) == "user: hi\nassistant: "
    assert tokenizer.encode("a<|end|>") == [97, 256]
