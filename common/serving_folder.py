"""What a model looks like on disk once it is ready to be served.

A serving folder is an ordinary Hugging Face folder (`config.json`, safetensors, `tokenizer.json`, …) plus a manifest,
`paceline.json`. The manifest is written last and the folder is renamed into place whole, so a folder that has one is
complete. Scheduler and executors open the same folder, or copies of it, and compare fingerprints.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST_NAME = "paceline.json"
MANIFEST_FORMAT = 1

_SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p")


class ServingFolderError(ValueError):
    """A path is not a serving folder, or cannot be made into one; the message says what to do."""


@dataclass(frozen=True)
class ServingFolder:
    """A complete serving folder."""

    path: Path
    model_name: str
    fingerprint: str  # sha256 over every file but the manifest, in hexadecimal

    @classmethod
    def open(cls, path: str | Path) -> "ServingFolder":
        """Open the serving folder at `path` without reading its weights.

        Raises:
            ServingFolderError: something is missing.
        """
        folder = Path(path).expanduser().absolute()
        if not folder.is_dir():
            raise ServingFolderError(
                f"'{folder}' is {'a file' if folder.exists() else 'not there'}, not a serving folder; "
                f"make one with `paceline prepare MODEL`"
            )
        manifest = _read_object(folder, MANIFEST_NAME)
        if manifest.get("format") != MANIFEST_FORMAT:
            raise ServingFolderError(
                f"'{folder / MANIFEST_NAME}' has format {manifest.get('format')!r} and this release reads format "
                f"{MANIFEST_FORMAT}; make the folder again with `paceline prepare`"
            )
        for key in ("model_name", "fingerprint"):
            if not isinstance(manifest.get(key), str) or not manifest[key]:
                raise ServingFolderError(
                    f"'{folder / MANIFEST_NAME}' has no '{key}'; make the folder again with `paceline prepare`"
                )
        for name in ("config.json", "tokenizer.json", "generation_config.json", *weight_names(folder)):
            if not (folder / name).is_file():
                raise ServingFolderError(_missing(folder, name))
        return cls(folder, manifest["model_name"], manifest["fingerprint"])

    @property
    def tokenizer_path(self) -> Path:
        """The file that `tokenizers.Tokenizer.from_file` reads."""
        return self.path / "tokenizer.json"

    @property
    def chat_template(self) -> str | None:
        """Text of the model's Jinja chat template; None when it has none."""
        file = self.path / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens by the names that chat templates use, such as `bos_token`."""
        if not (self.path / "special_tokens_map.json").is_file():
            return {}
        named = _read_object(self.path, "special_tokens_map.json")
        return {name: token for name, token in named.items() if isinstance(token, str)}

    def generation_defaults(self) -> dict[str, Any]:
        """The sampling values that the model's authors recommend; only those that they named."""
        settings = _read_object(self.path, "generation_config.json")
        return {key: settings[key] for key in _SAMPLING_KEYS if settings.get(key) is not None}


def weight_names(folder: Path) -> list[str]:
    """Names of the safetensors files of the model in `folder`, whether they are there or not."""
    if not (folder / "model.safetensors.index.json").is_file():
        return ["model.safetensors"]
    weight_map = _read_object(folder, "model.safetensors.index.json").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ServingFolderError(
            f"'{folder / 'model.safetensors.index.json'}' has no 'weight_map'; get the model's files again"
        )
    return sorted(set(weight_map.values()))


def fingerprint_of(path: str | Path) -> str:
    """Hash over name, size and content of every file under `path` but the manifest, in hexadecimal."""
    folder = Path(path)
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    whole = hashlib.sha256()
    for name in names:
        if name == MANIFEST_NAME:
            continue
        with (folder / name).open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        whole.update(json.dumps([name, (folder / name).stat().st_size, digest]).encode())
    return whole.hexdigest()


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ServingFolderError(_missing(folder, name)) from None
    except (OSError, ValueError) as error:
        raise ServingFolderError(
            f"'{folder / name}' cannot be read: {error}; make the folder again with `paceline prepare`"
        ) from error
    if not isinstance(content, dict):
        raise ServingFolderError(
            f"'{folder / name}' must hold a JSON object; make the folder again with `paceline prepare`"
        )
    return content


def _missing(folder: Path, name: str) -> str:
    if name == MANIFEST_NAME:
        return (
            f"'{folder}' is not a serving folder: it has no {MANIFEST_NAME}; "
            f"make one from it with `paceline prepare {folder}`"
        )
    return f"serving folder '{folder}' has no {name}; make it again with `paceline prepare`"
