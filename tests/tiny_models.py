"""Tiny random models of many architectures, saved as serving folders; the same bits every time."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from common.serving_folder import fingerprint_of

VOCABULARY_SIZE = 320
END_TOKEN = "<|end|>"
END_TOKEN_ID = 256
WINDOW = 16

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": END_TOKEN_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_SLIDING = {"sliding_window": WINDOW}
_ALTERNATING = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SHARING = {  # the last two layers have no keys of their own
    **_SLIDING,
    "head_dim": 16,
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY_SIZE,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "hidden_size": None,
    "num_hidden_layers": None,
    "num_attention_heads": None,
    "max_position_embeddings": None,
    "num_key_value_heads": None,
    "intermediate_size": None,
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}

# What each architecture needs beside the common settings; None takes a common setting away.
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2_moe": {**_MIXTURE, **_SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**_MIXTURE, "head_dim": 16},
    "mistral": _SLIDING,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {
        **_ALTERNATING,
        "head_dim": 16,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "gemma3_text": {**_ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": {**_ALTERNATING, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": _SLIDING,
    "gpt2": _GPT2,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": None, "init_std": 0.3},
    "gpt_neox": {"num_key_value_heads": None},
    "olmo2": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "stablelm": {},
    "granite": {"attention_multiplier": 0.25, "logits_scaling": 2.0},
    "starcoder2": _SLIDING,
    "cohere": {"logit_scale": 0.5},
    "cohere2": {**_ALTERNATING, "logit_scale": 0.5},
    "llama4_text": {
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
    "deepseek_v3": _LATENT,
    "olmo3": _ALTERNATING,
    "ministral": {**_ALTERNATING, "head_dim": 16},
    "gemma3n_text": {
        **_SHARING,
        "intermediate_size": [96] * 5,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    # Full layers with wider heads than sliding ones, and with fewer.
    "gemma4_text": {**_SHARING, "global_head_dim": 32},
    "mimo_v2_flash": {
        **_SLIDING,
        "num_hidden_layers": 4,
        "layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")],
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "num_key_value_heads": 1,
        "head_dim": 16,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "diffllama": {},
}
ARCHITECTURES = tuple(_SETTINGS)


def build_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A float32 model with random weights, the same for the same arguments; `changes` override its configuration."""
    settings = {**_COMMON, **_SETTINGS[architecture], **changes}
    kept = {name: value for name, value in settings.items() if value is not None or name.endswith("_token_id")}
    config = AutoConfig.for_model(architecture, **kept)
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(architecture.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        # Some families start biases, norms or sinks at 0 or 1, where forgetting them would go unseen.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def save_serving_folder(architecture: str, path: Path, **changes: Any) -> Path:
    """Save the model as a complete serving folder at `path`."""
    return save_model(build_model(architecture, **changes), architecture, path)


def save_model(model: PreTrainedModel, name: str, path: Path) -> Path:
    """Save any model as a complete serving folder at `path`."""
    model.generation_config.eos_token_id = END_TOKEN_ID
    model.generation_config.pad_token_id = END_TOKEN_ID
    transformers_logging.disable_progress_bar()
    model.save_pretrained(path)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    manifest = {"format": 1, "model_name": name, "fingerprint": fingerprint_of(path)}
    (path / "paceline.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i for the first 256; then come `<|end|>` and specials that fill the vocabulary."""
    byte_characters = _byte_characters()
    vocabulary = {character: byte for byte, character in enumerate(byte_characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END_TOKEN, *(f"<|special_{index}|>" for index in range(END_TOKEN_ID + 1, VOCABULARY_SIZE))]
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + rank) for rank, byte in enumerate(others)}
    return [characters[byte] for byte in range(256)]
