"""Steps on a GPU: kernels in Triton, what they read, and how steps are queued and replayed."""
