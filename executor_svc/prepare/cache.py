"""The cache of prepared models: a serving folder for each, made once."""

import contextlib
import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common.serving_folder import MANIFEST_FORMAT, MANIFEST_NAME, ServingFolder, ServingFolderError
from executor_svc.cache_home import default_cache_home
from executor_svc.prepare.default_model import DEFAULT_MODEL, DefaultModel
from executor_svc.prepare.draft import Draft
from executor_svc.prepare.gguf_file import GgufFile
from executor_svc.prepare.hub import HubFolder, HubModel
from executor_svc.prepare.source import Progress, Source


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
    target = models / _folder_name(found)
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


def _find(source: str, path: Path) -> Source:
    if source == DEFAULT_MODEL:
        return DefaultModel()
    if path.is_file():
        return GgufFile.find(path.resolve())
    if path.is_dir():
        return HubFolder.find(path.resolve())
    if source.count("/") == 1 and all(source.split("/")) and not source.startswith((".", "~", "/")):
        return HubModel(source)
    raise ServingFolderError(
        f"'{source}' is not a model: there is no such file or folder, and it is neither '{DEFAULT_MODEL}' nor a hub "
        f"id like 'org/name'"
    )


def _folder_name(source: Source) -> str:
    digest = hashlib.sha256(f"{MANIFEST_FORMAT}\n{source.identity}".encode()).hexdigest()[:10]
    return f"{source.model_name.replace('/', '--')}-{digest}"


def _make(source: Source, target: Path, progress: Progress) -> ServingFolder:
    """Fill a temporary folder beside `target` and rename it into place."""
    for stale in target.parent.glob(f".{target.name}.part-*"):
        shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed; the lock says that none is alive
    draft = Draft(Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent)))
    try:
        source.write(draft, progress)
        progress("checking", 0.9)
        draft.complete(source.model_name, source.description)
        if target.exists():
            with contextlib.suppress(ServingFolderError):
                return ServingFolder.open(target)  # made at the same time where files cannot be locked; as good as ours
            shutil.rmtree(target)  # something was deleted from it
        draft.move_to(target)
        progress("ready", 1.0)
        return ServingFolder.open(target)
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


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
