import json
import shutil
from pathlib import Path

import pytest

from common.serving_folder import ServingFolder, ServingFolderError, fingerprint_of

FILES = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "generation_config.json": '{"eos_token_id": 2, "do_sample": true, "temperature": 0.6, "top_p": null}',
    "chat_template.jinja": "{{ messages }}",
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "model.safetensors": "weights",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_text(content)
    manifest = {"format": 1, "model_name": "tiny", "fingerprint": fingerprint_of(path), "source": "", "release": ""}
    (path / "paceline.json").write_text(json.dumps(manifest))
    return path


def test_opens_a_complete_folder(folder: Path):
    """Scheduler and executor learn the model's name and fingerprint without reading its weights."""
    opened = ServingFolder.open(str(folder))

    assert opened == ServingFolder(folder, "tiny", fingerprint_of(folder))
    assert opened.tokenizer_path == folder / "tokenizer.json"
    assert opened.chat_template == "{{ messages }}"
    assert opened.special_tokens == {"bos_token": "<s>"}


def test_a_value_that_the_authors_left_null_is_no_default(folder: Path):
    """What the model does not recommend falls back to the service's own default, so null must not stand in for it."""
    assert ServingFolder.open(folder).generation_defaults() == {"do_sample": True, "temperature": 0.6}


def test_a_model_without_chat_template_says_none(folder: Path):
    """Base models are served too; only chat requests to them are refused."""
    (folder / "chat_template.jinja").unlink()

    assert ServingFolder.open(folder).chat_template is None


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors", "paceline.json"]
)
def test_names_the_missing_file_and_the_way_out(folder: Path, name: str):
    """A folder that lost a file must fail at start with a remedy, not later in somebody's request."""
    (folder / name).unlink()

    with pytest.raises(ServingFolderError, match=rf"{folder}.*{name}.*paceline prepare"):
        ServingFolder.open(folder)


def test_names_the_missing_shard(folder: Path):
    """A sharded model is complete only with all of its shards."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with pytest.raises(ServingFolderError, match=r"model-00002-of-00002\.safetensors"):
        ServingFolder.open(folder)
    (folder / "model-00002-of-00002.safetensors").write_text("more weights")
    assert ServingFolder.open(folder).model_name == "tiny"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"format": 2, "model_name": "tiny", "fingerprint": "00"}', "format 2"),
        ('{"format": 1, "model_name": "tiny"}', "no 'fingerprint'"),
        ('{"format": 1, "model_name"', "cannot be read"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_refuses_a_manifest_it_cannot_trust(folder: Path, content: str, complaint: str):
    """A manifest of another release, or a broken one, must not pass for a complete folder."""
    (folder / "paceline.json").write_text(content)

    with pytest.raises(ServingFolderError, match=complaint):
        ServingFolder.open(folder)


def test_says_whether_the_path_is_missing_or_a_file(tmp_path: Path):
    """A mistyped path and a GGUF file in the wrong place are different mistakes."""
    (tmp_path / "model.gguf").write_text("")

    with pytest.raises(ServingFolderError, match=r"nowhere' is not there"):
        ServingFolder.open(tmp_path / "nowhere")
    with pytest.raises(ServingFolderError, match=r"model\.gguf' is a file"):
        ServingFolder.open(tmp_path / "model.gguf")


def test_the_fingerprint_follows_content_and_names_only(folder: Path, tmp_path: Path):
    """Two machines with the same files agree; one changed byte or a renamed file is another model."""
    before = fingerprint_of(folder)
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "paceline.json").write_text("another manifest")

    assert fingerprint_of(copied) == before
    (copied / "model.safetensors").write_text("weightz")
    assert fingerprint_of(copied) != before
    (copied / "model.safetensors").write_text("weights")
    assert fingerprint_of(copied) == before
    (copied / "config.json").rename(copied / "configuration.json")
    assert fingerprint_of(copied) != before
