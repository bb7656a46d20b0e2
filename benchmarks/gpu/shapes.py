"""Models with random weights in the shapes of real ones: made on the device and saved as serving folders."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
import string
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.serving_folder import MANIFEST_FORMAT, MANIFEST_NAME

_BYTES_PER_NUMBER = 2  # bfloat16
_WRITERS = 4  # one thread writes to memory at a fraction of its speed


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder; its weights are random, which changes nothing about how fast it is."""

    name: str
    family: str  # as transformers calls it
    hidden: int
    inner: int
    layer_count: int
    head_count: int
    key_head_count: int
    head_dim: int
    vocabulary_size: int
    is_tied: bool  # whether the table of tokens is also the last matrix

    @property
    def step_weight_bytes(self) -> int:
        """What every step reads of the weights: all but the rows of the table that it does not ask for."""
        heads = (self.head_count + 2 * self.key_head_count) * self.head_dim
        layer = self.hidden * (heads + self.head_count * self.head_dim + 3 * self.inner + 2)
        return _BYTES_PER_NUMBER * (self.layer_count * layer + self.hidden * (self.vocabulary_size + 1))

    @property
    def token_cache_bytes(self) -> int:
        """Keys and values of one token."""
        return _BYTES_PER_NUMBER * 2 * self.layer_count * self.key_head_count * self.head_dim

    def config(self) -> Any:
        """Its configuration for transformers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layer_count,
            num_attention_heads=self.head_count,
            num_key_value_heads=self.key_head_count,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary_size,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=32768,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            dtype="bfloat16",
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8B", "llama", 4096, 14336, 32, 32, 8, 128, 128256, is_tied=False),  # Llama 3.1
        Shape("3B", "llama", 3072, 8192, 28, 24, 8, 128, 128256, is_tied=True),  # Llama 3.2
        Shape("0.5B", "qwen2", 896, 4864, 24, 14, 2, 64, 151936, is_tied=True),  # Qwen 2.5
    )
}
REHEARSED = {
    shape.name: shape
    for shape in (
        Shape("8B", "llama", 64, 96, 2, 4, 2, 16, 512, is_tied=False),
        Shape("3B", "llama", 48, 64, 1, 3, 1, 16, 512, is_tied=True),
        Shape("0.5B", "qwen2", 56, 64, 1, 7, 1, 8, 512, is_tied=True),
    )
}


def shape_of(name: str, rehearse: bool) -> Shape:
    """The shape of that name, or what stands for it in a rehearsal."""
    return (REHEARSED if rehearse else SHAPES)[name]


def serving_folder(shape: Shape, parent: Path, device: str) -> Path:
    """The serving folder of a shape below `parent`; made if it is not there yet."""
    folder = parent / shape.name
    if (folder / MANIFEST_NAME).is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what is left of one that was not finished
    folder.mkdir(parents=True)
    config = shape.config()
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    _tokenizer(shape.vocabulary_size).save(str(folder / "tokenizer.json"))
    _write_weights(config, shape, folder, device)
    fingerprint = hashlib.sha256(json.dumps(asdict(shape)).encode()).hexdigest()  # hashing 16 GB takes 10 s
    manifest = {"format": MANIFEST_FORMAT, "model_name": shape.name, "fingerprint": fingerprint}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def _write_weights(config: Any, shape: Shape, folder: Path, device: str) -> None:
    """A file for each layer and one for the rest, several at once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    files: dict[str, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():
        if not (shape.is_tied and name == "lm_head.weight"):
            layer = name.split(".")[2] if ".layers." in name else "rest"
            files[f"model-{layer}.safetensors"][name] = parameter.shape
    with ThreadPoolExecutor(_WRITERS) as writers:
        list(writers.map(lambda file: _write_file(folder / file[0], file[1], device), files.items()))
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_file(path: Path, shapes: dict[str, Any], device: str) -> None:
    """Random tensors of these shapes, seeded by the file's name, as safetensors.

    Written piece by piece, because the library's own writer copies everything twice and keeps other threads from
    running meanwhile.
    """
    import torch

    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _BYTES_PER_NUMBER * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)
    generator = torch.Generator(device)
    generator.manual_seed(int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:6], "big"))
    with path.open("wb") as file:
        file.write(len(described).to_bytes(8, "little") + described)
        for name, shape in shapes.items():
            # Matrices keep the spread of what they are multiplied with; norms stay near one and biases near zero.
            spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.05
            middle = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            made = torch.empty(shape, dtype=torch.bfloat16, device=device)
            made.normal_(middle, spread, generator=generator)
            made.cpu().view(torch.uint8).numpy().tofile(file)


def _tokenizer(vocabulary_size: int) -> Any:
    """A text for every token, so that a scheduler has as much to decode as with a real model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("Ġ" + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    texts = itertools.islice(itertools.chain(alphabet, words), vocabulary_size)
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
