"""Models in a GGUF file, as llama.cpp has them."""

import contextlib
import functools
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.serving_folder import ServingFolderError
from executor_svc.prepare.draft import Draft
from executor_svc.prepare.loading import transformers_for
from executor_svc.prepare.source import Progress, state_of

_ONE_AT_A_TIME = threading.Lock()  # held while names in `gguf` are exchanged, which the whole process sees


@dataclass(frozen=True)
class GgufFile:
    """One file with configuration, weights and tokenizer."""

    path: Path
    model_name: str

    @classmethod
    def find(cls, path: Path) -> "GgufFile":
        """Take the file at `path` when it is what its name says."""
        with path.open("rb") as content:
            magic = content.read(4)
        if magic != b"GGUF":
            raise ServingFolderError(
                f"'{path}' is not a GGUF file: it begins with {magic!r}, not b'GGUF'; name a .gguf file or a model's "
                f"folder"
            )
        return cls(path, path.stem)

    @property
    def identity(self) -> str:
        return state_of([self.path])

    @property
    def description(self) -> str:
        return str(self.path)

    def write(self, draft: Draft, progress: Progress) -> None:
        progress("reading the GGUF file", 0.35)
        with transformers_for(self.path) as transformers:
            with _parsing_once():
                tokenizer = self._load(transformers.AutoTokenizer)
                progress("unpacking the weights", 0.45)
                model = self._load_model(transformers)
            _repair_tokenizer(tokenizer, model.config)

            progress("writing the weights", 0.7)
            draft.write_model(self._as_writable(model, transformers))
        draft.write_tokenizer(tokenizer)

    def _load_model(self, transformers: Any) -> Any:
        import torch

        with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar that no setting turns off
            return self._load(transformers.AutoModelForCausalLM, dtype=torch.float32, attn_implementation="eager")

    def _load(self, kind: Any, **options: Any) -> Any:
        return kind.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True, **options)

    def _as_writable(self, loaded: Any, transformers: Any) -> Any:
        """Move the tensors of `loaded` into a model that can be saved: one that came from GGUF refuses to be.

        That one is made without memory of its own: nothing is held twice.
        """
        import torch

        config = loaded.config
        config.name_or_path = self.model_name
        with contextlib.suppress(AttributeError):
            del config.quantization_config
        with torch.device("meta"):
            fresh = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        fresh.load_state_dict(loaded.state_dict(), assign=True)
        fresh.tie_weights()
        fresh.generation_config = loaded.generation_config
        return fresh.to(_smallest_exact_dtype(loaded))


@contextlib.contextmanager
def _parsing_once() -> Iterator[None]:
    """Let `gguf` answer the same question once, however often transformers asks.

    transformers 5.17 to 5.23 parse most files for the configuration, again for the tokenizer and again for the
    weights, and make the same table of tensor names for every module of the model: two thirds of the time. Both
    answers follow from the arguments alone. A transformers that asks in another way gets what it always got, as slowly.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """A reader that slices a plain array, which is more than twice as fast as slicing numpy's memory map."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    with _ONE_AT_A_TIME:
        reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = functools.cache(Reader), functools.cache(name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map


def _repair_tokenizer(tokenizer: Any, config: Any) -> None:
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
