"""What the kernels moved, as the engine has counted it."""

import ctypes
from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

SECTOR = 32


class Moved(NamedTuple):
    """Of one tensor, in one launch. The fields of `Traffic` in simt.h, reading before writing."""

    read: int = 0  # bytes that threads asked for
    written: int = 0
    read_once: int = 0  # bytes of the sectors touched, each counted once a launch
    written_once: int = 0
    read_by_blocks: int = 0  # each counted once a block
    written_by_blocks: int = 0


class _Entry(ctypes.Structure):
    _fields_ = [
        ("launch", ctypes.c_uint64),
        ("begin", ctypes.c_uint64),
        ("counts", ctypes.c_uint64 * 6),
    ]


@contextmanager
def count_traffic(variant_dir, log):
    """Fill `log`, a list, with a dict for each launch: the tensor's address -> Moved. Of the blocks'
    shared memory the address is 0."""
    (extension,) = variant_dir.glob("*.abi3.so")
    library = ctypes.CDLL(extension)
    library.simt_traffic.argtypes = [ctypes.c_size_t, ctypes.POINTER(_Entry)]
    library.simt_traffic.restype = ctypes.c_bool
    library.simt_count_traffic(ctypes.c_bool(True))
    try:
        yield
        launches = defaultdict(dict)
        entry, index = _Entry(), 0
        while library.simt_traffic(index, entry):
            counts = [n if i < 2 else n * SECTOR for i, n in enumerate(entry.counts)]
            of_launch = launches[entry.launch]
            before = of_launch.get(entry.begin, Moved())
            of_launch[entry.begin] = Moved(*map(sum, zip(before, counts)))
            index += 1
        log.extend(launches[i] for i in range(len(launches)))
    finally:
        library.simt_count_traffic(ctypes.c_bool(False))
