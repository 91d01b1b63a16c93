"""Times llama_ext's operations beside what else does the same job; see `python -m benchmarks -h`."""
