"""What is always around a model that transformers loads: silence, and one error for all that can go wrong."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.serving_folder import ServingFolderError


@contextlib.contextmanager
def transformers_for(source: Path) -> Iterator[Any]:
    """Import transformers to load `source`, without its warnings and progress bars: ours say enough.

    Raises:
        ServingFolderError: whatever transformers and its parts raise about a model, as one error that names it.
        OSError: the disk that is written to is full or cannot be written.
    """
    with _quiet_transformers() as transformers:
        try:
            yield transformers
        except (ServingFolderError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise  # the cache's disk, not the model
            if "No space left on device" in str(error):  # safetensors has an exception of its own
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise ServingFolderError(
                f"transformers cannot read '{source}': {first_line(error)}; check that the files are complete and "
                f"that this release of transformers knows the model"
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[Any]:
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


def first_line(error: Exception) -> str:
    """The first line of what `error` says, or its name when it says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
