from dataclasses import dataclass
import torch
@dataclass(frozen=True, slots=True)
class SamplingParameters:
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    key: torch.Tensor
def sample_rows(logits, params, chosen, finite):
    best, tokens = logits.max(-1)
    chosen.copy_(tokens); finite.copy_(best.isfinite())
