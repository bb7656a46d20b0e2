"""A serving folder while it is being written."""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common.serving_folder import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    ServingFolderError,
    fingerprint_of,
    weight_names,
)

_SHARD_SIZE = "4GB"

# Keys that say where and with which release a file was written. Without them, two machines that prepare the same
# model get the same fingerprint.
_VOLATILE_KEYS = (
    "_from_model_config",
    "_model_name_or_path",
    "_name_or_path",
    "is_local",
    "local_files_only",
    "transformers_version",
)

# Text whose tokens must survive the way into tokenizer.json: leading space, several bytes per character, an emoji
# of several code points, white space, digits.
_TOKENIZER_SAMPLES = (" leading space", "naïve — 東京 Привет", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "a\n\n  b\tc", "1234567890")


@dataclass(frozen=True)
class Draft:
    """A serving folder that is not whole yet: it has no manifest, and nobody else looks at it."""

    path: Path

    def take(self, source: Path) -> None:
        """Hard-link a file, which costs neither time nor space; copy it where the file system cannot."""
        target = self.path / source.name
        try:
            os.link(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)

    def write_model(self, model: Any) -> None:
        """Write the weights, the configuration and the generation configuration of a transformers model."""
        byte_count = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        if shutil.disk_usage(self.path).free < byte_count:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, the weights need {byte_count / 1e6:.0f} MB")
        model.save_pretrained(self.path, max_shard_size=_SHARD_SIZE)
        for name in weight_names(self.path):
            (self.path / name).chmod(0o644)  # safetensors makes them readable by their owner only

    def write_tokenizer(self, tokenizer: Any) -> None:
        """Write what the scheduler reads: `tokenizer.json`, the chat template, and the special tokens it may name.

        Comes last: it also completes the configuration files that came with the model.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ServingFolderError(
                f"the tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json, which the scheduler "
                f"reads; use a model with a fast tokenizer"
            )
        backend.no_padding()
        backend.no_truncation()
        tokenizer.save_pretrained(self.path)
        _write_json(self.path / "special_tokens_map.json", dict(tokenizer.special_tokens_map))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            _drop_volatile_keys(self.path / name)
        _complete_generation_config(tokenizer, self.path / "generation_config.json")
        _check_tokenizer(tokenizer, self.path / "tokenizer.json")

    def complete(self, model_name: str, source: str) -> None:
        """Add the manifest, with everything else safely on disk before it."""
        for file in self.path.rglob("*"):
            _sync(file)
        manifest = {
            "format": MANIFEST_FORMAT,
            "model_name": model_name,
            "fingerprint": fingerprint_of(self.path),
            "source": source,
            "release": _release(),
        }
        (self.path / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _sync(self.path / MANIFEST_NAME)
        _sync(self.path)
        self.path.chmod(0o755)  # mkdtemp makes it readable by its owner only

    def move_to(self, target: Path) -> None:
        """Become `target`, at once and whole."""
        os.rename(self.path, target)
        _sync(target.parent)


def _check_tokenizer(tokenizer: Any, file: Path) -> None:
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(file))
    for sample in (*_TOKENIZER_SAMPLES, "".join(tokenizer.all_special_tokens)):
        ids = tokenizer(sample)["input_ids"]
        if written.encode(sample).ids != ids:
            raise ServingFolderError(
                f"tokenizer.json reads {sample!r} as {written.encode(sample).ids} but transformers reads it as {ids}; "
                f"this tokenizer cannot be served"
            )


def _complete_generation_config(tokenizer: Any, file: Path) -> None:
    """Without an end-of-sequence id no answer would ever end; the tokenizer knows one where the model does not."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("eos_token_id") is None and tokenizer.eos_token_id is not None:
        _write_json(file, {**settings, "eos_token_id": tokenizer.eos_token_id})


def _drop_volatile_keys(file: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in settings.items() if key not in _VOLATILE_KEYS}
    if kept != settings:
        file.unlink()  # may be a link to a file that is not ours
        _write_json(file, kept)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _release() -> str:
    try:
        return metadata.version("paceline-server")
    except metadata.PackageNotFoundError:
        return "unknown"
