"""Models as on the Hugging Face hub: a folder on this machine, or an id to download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.serving_folder import MANIFEST_NAME, ServingFolderError, weight_names
from executor_svc.prepare.default_model import DEFAULT_MODEL
from executor_svc.prepare.draft import Draft
from executor_svc.prepare.loading import first_line, transformers_for
from executor_svc.prepare.source import Progress, state_of

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, by its id."""

    model_name: str

    @property
    def identity(self) -> str:
        return f"hub {self.model_name}"

    @property
    def description(self) -> str:
        return f"{self.model_name} on the Hugging Face hub"

    def write(self, draft: Draft, progress: Progress) -> None:
        progress(f"downloading {self.model_name}", 0.0)
        from huggingface_hub import snapshot_download

        try:
            # The hub's own cache keeps the files, so an interrupted download goes on where it was.
            snapshot = snapshot_download(
                self.model_name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
            )
        except Exception as error:
            raise ServingFolderError(
                f"cannot download '{self.model_name}' from the Hugging Face hub: {first_line(error)}; check the id and "
                f"the network, set HF_TOKEN if it is not public, or prepare a folder that is on this machine"
            ) from error
        HubFolder.find(Path(snapshot)).write(draft, progress)


@dataclass(frozen=True)
class HubFolder:
    """A folder with configuration, weights and tokenizer."""

    path: Path

    @classmethod
    def find(cls, path: Path) -> "HubFolder":
        """Take the folder at `path` once it has all that a model needs."""
        needed = {
            "config.json": ("config.json",),
            "weights (model.safetensors or pytorch_model.bin, whole or with an index)": _SAFETENSORS + _PICKLES,
            "tokenizer (tokenizer.json, tokenizer.model, vocab.json or vocab.txt)": _TOKENIZERS,
        }
        lacks = [what for what, names in needed.items() if not any((path / name).is_file() for name in names)]
        if lacks:
            raise ServingFolderError(
                f"'{path}' is neither a serving folder (no {MANIFEST_NAME}) nor a model's folder: it has no "
                f"{', no '.join(lacks)}; name a complete folder, a .gguf file, a hub id like 'org/name' or "
                f"'{DEFAULT_MODEL}'"
            )
        return cls(path)

    @property
    def model_name(self) -> str:
        return self.path.name

    @property
    def identity(self) -> str:
        return state_of(sorted(file for file in self.path.iterdir() if file.is_file()))

    @property
    def description(self) -> str:
        return str(self.path)

    def write(self, draft: Draft, progress: Progress) -> None:
        progress("reading the tokenizer", 0.3)
        with transformers_for(self.path) as transformers:
            config = transformers.AutoConfig.from_pretrained(self.path, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(self.path, local_files_only=True)

            progress("taking over the weights", 0.5)
            if any((self.path / name).is_file() for name in _SAFETENSORS):
                self._take_safetensors(draft)
                draft.take(self.path / "config.json")
                self._generation_config(transformers, config).save_pretrained(draft.path)
            else:
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    self.path, dtype="auto", local_files_only=True
                )
                draft.write_model(model)
        draft.write_tokenizer(tokenizer)

    def _take_safetensors(self, draft: Draft) -> None:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            draft.take(index)
        for name in weight_names(self.path):
            if not (self.path / name).is_file():
                raise ServingFolderError(f"'{self.path}' has no {name}, which its index names; get the model again")
            draft.take(self.path / name)

    def _generation_config(self, transformers: Any, config: Any) -> Any:
        if (self.path / "generation_config.json").is_file():
            return transformers.GenerationConfig.from_pretrained(self.path, local_files_only=True)
        return transformers.GenerationConfig.from_model_config(config)
