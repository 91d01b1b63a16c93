"""Times llama_ext's operations beside what else does the same job; see `python -m benchmarks -h`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says nothing on stderr
