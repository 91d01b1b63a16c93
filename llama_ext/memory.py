"""Make glibc keep freed memory, so that large CPU tensors do not page-fault on every step.

By default glibc maps every block above a threshold (32 MiB at most) afresh and unmaps it when it
is freed; the kernel then has to fault in and clear each 4 KiB page again, which costs several
times more than the arithmetic of a memory-bound operation. torch's CPU allocator gets its memory
through posix_memalign and so is bound by the same rules.
"""

import ctypes
import os

# Parameter numbers of <malloc.h>. mallopt takes C ints.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_SETTINGS = {
    _M_MMAP_MAX: 0,            # large blocks come from the heap, never from mmap. The threshold
                               # itself (M_MMAP_THRESHOLD) cannot be raised above 32 MiB.
    _M_TRIM_THRESHOLD: 2**31 - 1,  # return the top of the heap only beyond 2 GiB, the largest int
    _M_TOP_PAD: 256 << 20,     # grow the heap in steps of 256 MiB
}

_reuses = False


def _glibc():
    """The C library when it is glibc, else None."""
    if not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        return None
    return ctypes.CDLL(None)


def reuse_freed_memory():
    """Tell glibc to keep and re-use freed memory in this process; True when it does so now.

    Process-wide and not undone: peak memory stays with the process. Repeated calls do nothing
    more; without glibc (macOS, musl) nothing happens and the result is False.
    """
    global _reuses
    if not _reuses:
        libc = _glibc()
        _reuses = libc is not None and all([libc.mallopt(k, v) for k, v in _SETTINGS.items()])
    return _reuses


def status():
    """One phrase on how this process treats freed CPU memory, for lx.info()."""
    if _reuses:
        return "kept and re-used (mallopt set by llama_ext)"
    if os.environ.get("MALLOC_MMAP_MAX_") == "0":
        return "kept and re-used (MALLOC_MMAP_MAX_=0 in the environment)"
    if _glibc() is None:
        return "left to the system's allocator (not glibc)"
    return "glibc's default: large blocks are mapped afresh (the trainer changes this)"
