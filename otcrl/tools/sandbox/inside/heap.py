"""Lays this process's heap out so that forks are cheap. It runs inside.

A fork copies the table of every small page that is mapped, and afterwards parent and child pay for every page that
they write. Hence what was loaded lies in huge pages, and what is allocated from now on lies together in new ones:
left to itself it would go into the holes between what was loaded, and break those huge pages up again.
"""

from __future__ import annotations

import ctypes
from itertools import repeat

HUGE_PAGE, MADV_COLLAPSE = 2 << 20, 25
POOL = 16 << 10  # of CPython's allocator: blocks of one size, a multiple of 16 up to 512; larger ones are malloc's
MOST_BATCHES = 1000

filling: list[object] = []
libc = ctypes.CDLL(None, use_errno=True)


class MallocInfo(ctypes.Structure):
    """`struct mallinfo2`: mallinfo(3)."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "top")
    )


def settle() -> None:
    """To be called once, when all is loaded and before the first fork."""
    for size in range(16, 513, 16):
        fill_pools(size)
    if hasattr(libc, "mallinfo2"):  # glibc 2.33 and later
        fill_malloc()
    use_huge_pages()


def fill_pools(size: int) -> None:
    """Blocks of `size` bytes until the next ones come from a pool of their own."""
    for _ in range(MOST_BATCHES):
        filling.append(batch := [block(size) for _ in repeat(None, POOL // size)])
        if max(map(id, batch)) - min(map(id, batch)) < 2 * POOL:  # at least every second one of a neighbourhood
            return


def block(size: int) -> object:
    return object() if size == 16 else complex(1, 1) if size == 32 else bytes(size - 33)


def fill_malloc() -> None:
    """Chunks, large ones first, until malloc has only its top left."""
    libc.mallinfo2.restype = MallocInfo
    libc.malloc.restype = ctypes.c_void_p
    size = 64 << 10
    while size >= 24:
        info = libc.mallinfo2()
        if info.free - info.top >= size:
            libc.malloc(ctypes.c_size_t(size))
            if libc.mallinfo2().top == info.top:
                continue
        size = size * 3 // 4  # no hole is that large


def use_huge_pages() -> None:
    """Where the kernel can: 6.1 and later."""
    with open("/proc/self/maps") as file:
        maps = [line.split() for line in file]
    for addresses, access, *rest in maps:
        if access == "rw-p" and (len(rest) == 3 or rest[3] == "[heap]"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            for start in range(-(-first // HUGE_PAGE) * HUGE_PAGE, last - HUGE_PAGE + 1, HUGE_PAGE):
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)
