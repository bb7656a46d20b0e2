"""Loading a serving folder: which device and type, which limits, and whether the model can be served at all."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_utils
from transformers.utils import logging as transformers_logging

from common.serving_folder import ServingFolder, ServingFolderError, weight_names
from executor_svc.attention.backend import AttentionBackend
from executor_svc.attention.hook import ATTENTION_NAME
from executor_svc.decoder_parts import UnknownPartsError
from executor_svc.gpu.packed_step import PagedAttention
from executor_svc.kept_checks import Checks
from executor_svc.memory import forget
from executor_svc.native.build import NativeUnavailableError
from executor_svc.native.model import NativeDecoder
from executor_svc.native.weights import check_native, round_to_int8
from executor_svc.packed_model import PackedModel, UnpackableError
from executor_svc.self_test import PlainLogits, StepModel, check_steps, plain_logits
from executor_svc.start_times import Progress

log = structlog.get_logger()

_T = TypeVar("_T")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them
_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}  # what packed mode can mask


class ModelError(ValueError):
    """A model cannot be served as asked; the message names the reason and the way out."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that passed its self-test, and what its files say about it."""

    steps: StepModel
    model_name: str
    fingerprint: str
    context_length: int
    end_token_ids: tuple[int, ...]
    dtype: torch.dtype
    weights: str  # empty: of that type; or int8
    failed_native: bool  # its steps in C++ did not pass the self-test, so it runs in torch

    @property
    def mode(self) -> str:
        """How steps run: `native` in C++, `fused` in kernels of our own, `packed` in the model's own modules."""
        return self.steps.mode

    @property
    def type_name(self) -> str:
        """The type in which steps compute, for people, and that of the weights where it is another one."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} with {self.weights} weights" if self.weights else name


def open_folder(path: str) -> ServingFolder:
    """The serving folder at `path`. Raises `ModelError`."""
    try:
        return ServingFolder.open(path)
    except ServingFolderError as error:
        raise ModelError(str(error)) from error


def load_model(
    path: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: AttentionBackend,
    max_model_len: int = 0,
    native_threads: int = 0,
    kept: Checks | None = None,
    progress: Progress = lambda _phase, _share: None,
    weights: str = "",
    paged: PagedAttention | None = None,
    fuses: bool = False,
    rank_count: int = 1,
) -> LoadedModel:
    """Load the serving folder at `path` and prove that its steps compute what the model computes.

    With `native_threads` they run in C++ where the machine and the model allow it, else in torch; with `weights` int8,
    which are rounded so first, in C++ or not at all. With `paged` attention steps read what they need on the device,
    where `fuses` says so as fused kernels if the model allows it. What `kept` says of an earlier start is not tested
    again. Of a model that `rank_count` ranks share this loads the part of one; all of them have to load it at once.

    Raises:
        ModelError: the folder, the model or `max_model_len` is not fit to serve.
    """
    progress("reading the configuration", 0.0)
    folder = open_folder(path)
    config = load_config(folder.path)
    context_length = context_length_of(config.get_text_config(), max_model_len)

    files = _ModelFiles(folder.path, config, device, dtype, weights, rank_count)
    steps, failed_native = _Start(files, backend, context_length, kept, progress, paged, fuses).steps(native_threads)
    return LoadedModel(
        steps=steps,
        model_name=folder.model_name,
        fingerprint=folder.fingerprint,
        context_length=context_length,
        end_token_ids=_end_token_ids(folder.path, config.get_text_config()),
        dtype=dtype,
        weights=weights,
        failed_native=failed_native,
    )


@dataclass(frozen=True, slots=True)
class _ModelFiles:
    """A model on disk, to be had in as many ways as its steps need it."""

    path: Path
    config: Any
    device: torch.device
    dtype: torch.dtype  # in which it is served
    weights: str  # as which its matrices are; empty: that type
    rank_count: int = 1  # of processes that share it

    @property
    def class_name(self) -> str:
        return AutoModelForCausalLM._model_mapping[type(self.config)].__name__

    def load(self) -> Any:
        """The model as transformers runs it, on the device straight from its files."""
        return self._load(self.dtype, self.device).eval()

    def mapped(self) -> Any:
        """The model as a view of its files, in their own type: what nobody reads takes no memory."""
        return self._load(None).eval()

    def converted(self) -> Any:
        """The model as transformers runs it, of the weights with which it is served, never in memory twice."""
        model = self.mapped()
        if self.weights == "int8":
            round_to_int8(model, self.dtype)
        for parameter in model.parameters():
            if parameter.dtype != self.dtype:
                stored, parameter.data = parameter.data, parameter.data.to(self.dtype)
                forget(stored)
        return model

    def sketch(self) -> Any:
        """The model without its weights."""
        with torch.device("meta"), _quiet_transformers():
            model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
            model.set_experts_implementation("batched_mm")  # the only one that needs no weights to find shapes
            return model

    def _stored_dtype(self) -> torch.dtype:
        """The type of the weights in the files; where they have several, that in which they are served: none of them
        may be rounded to another's.
        """
        names = set()
        for file in weight_names(self.path):
            with safe_open(self.path / file, framework="pt") as stored:
                names |= {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118  not a dict
        return _STORED_DTYPES.get(names.pop(), self.dtype) if len(names) == 1 else self.dtype

    def _load(self, dtype: torch.dtype | None, device: torch.device | None = None) -> PreTrainedModel:
        """The model in a type, and on a device; None: in that of its files, in the host's memory."""
        placed: dict[str, Any] = {} if device is None or device.type == "cpu" else {"device_map": {"": device}}
        if self.rank_count > 1:
            placed = {"distributed_config": _shared_by(self.rank_count)}  # on the rank's own device
        try:
            dtype = dtype or self._stored_dtype()
            with _quiet_transformers(), _memory_for_each_weight():
                return AutoModelForCausalLM.from_pretrained(
                    self.path,
                    dtype=dtype,
                    attn_implementation="eager",  # the oracle of the self-test
                    local_files_only=True,
                    trust_remote_code=False,
                    **placed,
                )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"there is no memory on '{device}' for the weights in '{self.path}': {str(error).partition('. ')[0]}; "
                "end what else runs there, choose a smaller model or divide it with --tensor-parallel"
            ) from error
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"the weights in '{self.path}' cannot be loaded: {reason}; "
                "make the folder again with `paceline prepare`"
            ) from error


def _shared_by(rank_count: int) -> Any:
    """How `from_pretrained` divides a model between the ranks: by transformers' own plan."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=rank_count, tp_plan="auto")


def choose_device(name: str) -> torch.device:
    """The device that `name` means: `auto` takes a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ModelError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} is not there: this process sees {torch.cuda.device_count()} GPUs; "
            "use device 'auto' or 'cpu', or install a CUDA build of torch"
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that `name` means: `auto` is bfloat16 where the device computes in it, else float32."""
    if name == "auto":
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    if name not in _DTYPES:
        raise ModelError(f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))}, got {name!r}")
    return _DTYPES[name]


def context_length_of(config: Any, max_model_len: int = 0) -> int:
    """Tokens of prompt and output together that the model handles, at most `max_model_len` unless that is 0."""
    limit, reason = _position_limit(config)
    if not limit and not max_model_len:
        raise ModelError(f"the configuration of {config.model_type!r} names no context length; set max_model_len")
    if limit and max_model_len > limit:
        raise ModelError(f"max_model_len is {max_model_len} but {reason} {limit}; set it to {limit} or less, or to 0")
    return max_model_len or limit


def _position_limit(config: Any) -> tuple[int, str]:
    """How many positions keep the model in one regime, and the reason in words; 0 where nothing limits them."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limit = next((int(value) for name in names if (value := getattr(config, name, None))), 0)
    reason = "the model was made for"
    for rope in _rope_parameters(config):
        # longrope changes the rotation of the whole batch once any position in it passes the original length. Keys in
        # the cache would then be rotated otherwise than new queries, and short requests would feel long ones; so no
        # request may get there. `dynamic` changes past max_position_embeddings, which is the limit already.
        original = rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if rope.get("rope_type") == "longrope" and original and original < limit:
            limit, reason = int(original), "its longrope positions are served up to their original length of"
    floor_scale = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", None) and floor_scale and floor_scale <= limit:
        # Llama 4 takes positions for this tuning from the place in the batch; below the scale it does nothing.
        limit, reason = int(floor_scale) - 1, "its attention temperature is constant only up to"
    return limit, reason


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotation settings of all layer types; some configurations have one set, some one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def load_config(path: Path) -> Any:
    """The configuration of the model in a folder. Raises `ModelError` where nothing here could run it."""
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise ModelError(
            f"transformers cannot read '{path / 'config.json'}': {first_line}; "
            "a newer transformers may know the model, code that comes with a model is not run"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{config.model_type!r} in '{path}' has no causal language model in transformers; "
            "choose a decoder-only model"
        )
    reason = _unsupported_reason(config)
    if reason:
        raise ModelError(_refusal(AutoModelForCausalLM._model_mapping[type(config)].__name__, reason))
    return config


def _unsupported_reason(config: Any) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder model"
    types = set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYER_TYPES
    return f"it has layers of type {', '.join(sorted(map(repr, types)))}" if types else ""


@dataclass(frozen=True, slots=True)
class _Start:
    """One start of a model: how its steps are to run, and the proof that they change nothing."""

    files: _ModelFiles
    backend: AttentionBackend
    context_length: int
    kept: Checks | None
    progress: Progress
    paged: PagedAttention | None
    fuses: bool

    def steps(self, native_threads: int) -> tuple[StepModel, bool]:
        """The steps in C++ or as fused kernels if they can be had, else in packed mode; and whether those failed the
        self-test.

        Raises `ModelError` unless they compute what the model computes.
        """
        failed_native = False
        if not native_threads:
            self._leave_to_torch("they are for a CPU, and not with --no-native")
        else:
            try:
                return self._native(native_threads), False
            except NativeUnavailableError as error:
                self._leave_to_torch(str(error))
                log.info("the model runs in torch", reason=str(error))
            except UnpackableError as error:
                self._leave_to_torch(f"they failed the self-test: {error}")
                log.warning("the model runs in torch, its steps in C++ failed the self-test", reason=str(error))
                failed_native = True
        try:
            if self.paged is not None and self.fuses:
                try:
                    return self._fused(self.paged), failed_native
                except UnknownPartsError as error:
                    log.info("the model runs in its own modules", reason=str(error))
                except UnpackableError as error:
                    log.warning(
                        "the model runs in its own modules, fused steps failed the self-test", reason=str(error)
                    )
                    failed_native = True
            return self._packed(), failed_native
        except UnpackableError as error:
            raise ModelError(_refusal(self.files.class_name, str(error))) from error

    def _leave_to_torch(self, reason: str) -> None:
        """Refuse to where weights are wanted that only steps in C++ have: `ModelError`."""
        if self.files.weights:
            raise ModelError(
                f"{self.files.weights} weights need steps in C++, which cannot be had here: {reason}; "
                "leave --weights out to serve the model in its own type"
            )

    def _is_proven(self, mode: str) -> bool:
        return self.kept is not None and self.kept.mode == mode

    def _native(self, thread_count: int) -> NativeDecoder:
        """The model's steps in C++.

        What weights are needed for is done one after the other, so that they are in memory once: first the model
        computes what the test expects, and is let go; then they are packed, straight from the file.
        """
        sketch = _trial(self.files.sketch)
        self.progress("building steps in C++", 0.05)
        check_native(sketch, self.files.dtype)
        traits = self._switch(sketch).traits
        plain = None if self._is_proven("native") else self._converted_logits()
        self.progress("packing the weights", 0.3)
        try:
            native = NativeDecoder(
                self.files.mapped(),
                self.files.dtype,
                traits,
                self.context_length,
                thread_count,
                as_int8=self.files.weights == "int8",
            )
        except (NativeUnavailableError, ModelError):
            raise
        except Exception as error:
            raise UnpackableError(f"it cannot be taken apart: {type(error).__name__}: {error}") from error
        self._test(native, plain, 0.6)
        return native

    def _converted_logits(self) -> PlainLogits:
        """What the model itself computes, of whose weights nothing is left in memory."""
        self.progress("loading the weights", 0.1)
        model = self.files.converted()
        self.progress("testing the model", 0.2)
        plain = self._plain_logits(model)
        for parameter in model.parameters():
            forget(parameter)
        return plain

    def _fused(self, attention: PagedAttention) -> StepModel:
        """The model's steps as fused kernels."""
        from executor_svc.gpu.decoder import FusedDecoder  # needs Triton

        model = self._loaded()
        plain = None if self._is_proven("fused") else self._plain_logits(model)
        traits = self._switch(model).traits
        fused = FusedDecoder(model, traits, self.context_length, attention)
        self._test(fused, plain, 0.65)
        return fused

    def _packed(self) -> PackedModel:
        """The model's steps in its own modules."""
        model = self._loaded()
        plain = None if self._is_proven("packed") else self._plain_logits(model)
        packed = self._switch(model)
        self._test(packed, plain, 0.65)
        return packed

    def _loaded(self) -> Any:
        self.progress("loading the weights", 0.6)
        model = self.files.load()
        if getattr(model, "_is_stateful", False):
            raise UnpackableError("it carries a recurrent state")
        return model

    def _plain_logits(self, model: Any) -> PlainLogits:
        return _trial(lambda: plain_logits(model, model.config.get_text_config().vocab_size, self.context_length))

    def _switch(self, model: Any) -> PackedModel:
        """Switch the model to packed mode."""
        with _quiet_transformers():
            model.set_attn_implementation(ATTENTION_NAME)
        if model.config.get_text_config()._attn_implementation != ATTENTION_NAME:
            raise UnpackableError("it does not use the attention interface of transformers")
        return _trial(lambda: PackedModel(model, self.backend, self.context_length, self.paged))

    def _test(self, steps: StepModel, plain: PlainLogits | None, share: float) -> None:
        if plain is not None:
            self.progress("testing the model", share)
            _trial(lambda: check_steps(steps, plain, self.files.dtype))


def _trial(run: Callable[[], _T]) -> _T:
    """Run a part of the self-test; whatever a model's own code raises there speaks against packed mode."""
    try:
        return run()
    except (UnpackableError, ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnpackableError(f"its own code fails there with {type(error).__name__}: {error}") from error


def _refusal(class_name: str, reason: str) -> str:
    return (
        f"{class_name} cannot be served: {reason}; packed mode is the only one there is, "
        "so choose a model whose attention transformers lets us replace"
    )


def _end_token_ids(path: Path, config: Any) -> tuple[int, ...]:
    """The tokens that end an output, by the generation settings and else by the configuration."""
    settings = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    ids = settings.get("eos_token_id")
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (ids,)


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without such instructions bfloat16 is emulated, which is slower than float32.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(check() for name in checks if (check := getattr(torch.cpu, name, None)))


@contextmanager
def _memory_for_each_weight() -> Iterator[None]:
    """Let each weight have memory of its own on a GPU.

    Transformers first takes memory for all of them in one piece, of which torch can give nothing back as long as one
    weight is in it: what is let go there, when fused steps join matrices, would be lost to the cache. So only that so
    much can be had is found out with it.
    """
    take = getattr(modeling_utils, "caching_allocator_warmup", lambda *_: None)  # a release may do without it

    def take_and_give_back(*arguments: Any) -> None:
        take(*arguments)
        torch.cuda.empty_cache()

    modeling_utils.caching_allocator_warmup = take_and_give_back
    try:
        yield
    finally:
        modeling_utils.caching_allocator_warmup = take


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the executor's log."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()
