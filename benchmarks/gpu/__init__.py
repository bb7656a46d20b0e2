"""Everything that needs a GPU, in parts that each run in a process of their own: `benchmarks/gpu_check.sh`."""
