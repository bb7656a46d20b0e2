"""Attention in plain torch operations: any device, any head size.

Query heads of a group are rows of one matrix product with their key head (`enable_gqa` is many times slower on a
CPU). Scores and softmax are float32 whatever the model's type: scores held in bfloat16 move logits by up to 0.75.
"""

import torch
from torch.nn import functional

from executor_svc.attention.backend import ScoreRule
from executor_svc.attention.layout import DecodePart, Parts, PromptPart


class TorchAttention:
    """The portable backend. One instance serves one thread."""

    def __init__(self) -> None:
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, parts: Parts, rule: ScoreRule
    ) -> torch.Tensor:
        """Attend from every token of the step; see `AttentionBackend`."""
        head_count, token_count, _ = query.shape
        output = query.new_empty(token_count, head_count, values.shape[-1])
        for decode in parts.decode:
            attended = self._decode(query, keys, values, decode, rule)
            output.index_copy_(0, decode.query_index, attended.to(output.dtype))
        for prompt in parts.prompt:
            output[prompt.start : prompt.stop] = self._prompt(query, keys, values, prompt, rule)
        return output

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: DecodePart, rule: ScoreRule
    ) -> torch.Tensor:
        rows, key_heads = len(part.query_index), keys.shape[1]
        q = query.index_select(1, part.query_index).transpose(0, 1).float() * rule.scaling  # [B, heads, dim]
        q = q.reshape(rows, key_heads, -1, q.shape[-1])  # [B, key heads, heads of the group, dim]
        k = self._gather("key", keys, part.key_index).view(rows, key_heads, part.key_count, -1)
        v = self._gather("value", values, part.value_index).view(rows, key_heads, part.key_count, -1)
        scores = _capped(q @ k.transpose(-1, -2), rule.softcap)  # [B, key heads, heads of the group, L]
        if part.bias is not None:
            scores += part.bias
        sinks = None if rule.sinks is None else rule.sinks.view(key_heads, -1)
        return (_softmax(scores, sinks) @ v).flatten(1, 2)

    def _prompt(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: PromptPart, rule: ScoreRule
    ) -> torch.Tensor:
        key_heads = keys.shape[1]
        q = query[:, part.start : part.stop].unflatten(0, (key_heads, -1))  # [key heads, heads of the group, T, dim]
        if rule.softcap or rule.sinks is not None:
            return self._prompt_by_hand(q, keys, values, part, rule)
        k = keys.flatten(0, 1).index_select(0, part.key_index).view(key_heads, 1, part.key_count, -1)
        v = values.flatten(0, 1).index_select(0, part.value_index).view(key_heads, 1, part.key_count, -1)
        attended = functional.scaled_dot_product_attention(
            q,
            k.expand(-1, q.shape[1], -1, -1),
            v.expand(-1, q.shape[1], -1, -1),
            attn_mask=None if part.is_causal else part.mask(),
            is_causal=part.is_causal,
            scale=rule.scaling,
        )
        return attended.flatten(0, 1).transpose(0, 1)

    def _prompt_by_hand(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: PromptPart, rule: ScoreRule
    ) -> torch.Tensor:
        key_heads, group_size, query_count, dim = q.shape
        k = self._gather("key", keys, part.key_index).view(key_heads, part.key_count, -1)
        v = self._gather("value", values, part.value_index).view(key_heads, part.key_count, -1)
        rows = (q.float() * rule.scaling).reshape(key_heads, group_size * query_count, dim)
        scores = _capped(rows @ k.transpose(-1, -2), rule.softcap).unflatten(1, (group_size, query_count))
        scores.masked_fill_(~part.mask(), -torch.inf)
        weights = _softmax(scores, None if rule.sinks is None else rule.sinks.view(key_heads, group_size, 1))
        attended = weights.flatten(1, 2) @ v  # [key heads, heads of the group * T, dim]
        attended = attended.unflatten(1, (group_size, query_count)).flatten(0, 1)
        return attended.transpose(0, 1).to(q.dtype)

    def _gather(self, name: str, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Rows of `tensor` in float32, in memory that is used again: fresh pages would cost more than the copy."""
        rows = tensor.flatten(0, 1)
        shape = (len(index), rows.shape[-1])
        gathered = torch.index_select(rows, 0, index, out=self._buffer(name, rows, shape, rows.dtype))
        if gathered.dtype == torch.float32:
            return gathered
        return self._buffer(name, rows, shape, torch.float32).copy_(gathered)

    def _buffer(self, name: str, like: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        size = shape[0] * shape[1]
        buffer = self._scratch.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._scratch[name, dtype] = torch.empty(size, dtype=dtype, device=like.device)
        return buffer[:size].view(shape)


def _capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Weights over the last dimension; `sinks`, one for each line of scores, take their share and vanish."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().unsqueeze(-1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
