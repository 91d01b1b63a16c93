"""Times llama_ext's ops and models beside what else does the same: `python -m benchmarks -h`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says nothing on stderr
