"""The virtual A100: runs PTX on the CPU, stricter than hardware. See README.md beside this file.

    gpu = Device("A100", seed=0)
    module = gpu.load_ptx(text)
    stats = module.launch("kernel", grid=(x, y, z), block=(x, y, z), args=[...], shared=0)
"""

import importlib.util
import struct

import numpy as np

from .build import build as _build


def _load_engine():
    spec = importlib.util.spec_from_file_location("_engine", _build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_engine = _load_engine()
Fault = _engine.Fault
LoadError = _engine.LoadError

_FORMATS = {"u8": "B", "s8": "b", "b8": "B", "u16": "H", "s16": "h", "b16": "H", "f16": "e",
            "u32": "I", "s32": "i", "b32": "I", "f32": "f", "u64": "Q", "s64": "q", "b64": "Q",
            "f64": "d"}


def _triple(dims):
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    return dims + (1,) * (3 - len(dims))


def _extent(array):
    """(first address, bytes) of an array, also of one with gaps or negative strides."""
    low, high = np.lib.array_utils.byte_bounds(array)
    return low, high - low


class Device:
    """A virtual GPU. seed picks the order of blocks and warps. threads: CPU threads that run blocks
    (0: all cores; 1: results and faults of a racy kernel repeat too). limit: warp instructions
    after which a block counts as stuck."""

    def __init__(self, name="A100", seed=0, threads=0, limit=1_000_000_000):
        if name != "A100":
            raise ValueError(f"vgpu: device: expected A100, got {name}")
        self.engine = _engine.Device(seed, threads, limit)

    def load_ptx(self, text):
        """A module. Raises LoadError (a ValueError) that names the line of what is unknown."""
        return Module(self, self.engine.load(text))

    def register(self, array, initialised=True):
        """Makes an array device memory until unregister; arrays among a launch's arguments are for
        the time of that launch."""
        self.engine.add_memory(*_extent(array), initialised)

    def unregister(self, array):
        self.engine.remove_memory(_extent(array)[0])

    def empty(self, shape, dtype=np.float32):
        """A registered array that no kernel may read before one has written it."""
        array = np.empty(shape, dtype)
        self.register(array, initialised=False)
        return array


class Module:
    def __init__(self, device, module):
        self.device = device
        self.module = module

    @property
    def kernels(self):
        return self.module.kernels()

    def params(self, kernel):
        """[(PTX type, bytes), ...]"""
        return self.module.params(kernel)

    def launch(self, kernel, grid, block, args=(), shared=0):
        """Runs a kernel. args: arrays (shared in place), ints and floats (to the parameter's type),
        None (null), bytes (a struct). Returns the counters; raises Fault."""
        params = self.params(kernel)
        if len(args) != len(params):
            raise ValueError(f"vgpu: launch of {kernel}: expected {len(params)} arguments, "
                             f"got {len(args)}")
        arrays = [a for a in args if isinstance(a, np.ndarray) and a.nbytes]
        packed = [self._pack(kernel, i, a, *p) for i, (a, p) in enumerate(zip(args, params))]
        registered = []
        try:
            for array in arrays:
                self.device.register(array)
                registered.append(array)
            return self.device.engine.launch(self.module, kernel, _triple(grid), _triple(block),
                                             shared, packed)
        finally:
            for array in registered:
                self.device.unregister(array)

    def _pack(self, kernel, index, value, kind, size):
        if isinstance(value, np.ndarray):
            value = value.ctypes.data
        elif value is None:
            value = 0
        if isinstance(value, (bytes, bytearray)):
            if len(value) != size:
                raise ValueError(f"vgpu: launch of {kernel}: argument {index}: expected {size} "
                                 f"bytes, got {len(value)}")
            return bytes(value)
        if size not in (1, 2, 4, 8) or kind not in _FORMATS:
            raise ValueError(f"vgpu: launch of {kernel}: argument {index}: expected bytes for a "
                             f"parameter of {size} bytes, got {type(value).__name__}")
        code = _FORMATS[kind]
        if isinstance(value, (float, np.floating)) and code not in "efd":
            code = {2: "e", 4: "f", 8: "d"}[size]  # a float behind an untyped .b32
        elif code not in "efd":
            value = int(value)
            code = code.upper() if value >= 0 else code.lower()
        return struct.pack("<" + code, value)
