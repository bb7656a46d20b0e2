"""The executor: owns the KV cache tensors and runs the forward passes that the scheduler plans."""
