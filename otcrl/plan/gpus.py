"""What a GPU can do at most, from its maker's data sheet."""

from __future__ import annotations

import os
from dataclasses import dataclass

from otcrl.errors import ConfigError, nearest

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class GPU:
    """One device. Rates are per second and per direction; nothing reaches them, which is what the ceilings are for."""

    name: str
    memory: float  # bytes that PyTorch reports as the device's total
    flops: float  # bfloat16 matrix products, dense, float32 accumulation
    bandwidth: float  # bytes/s of its own memory
    link: float  # bytes/s to the other GPUs of its node
    network: float  # bytes/s to other nodes: its share of the node's adapters
    host_link: float  # bytes/s to main memory: PCIe


def gpu(name: str, gib: float, tflops: float, gbps: float, link: float, network: float, host: float) -> GPU:
    rates = {"bandwidth": gbps * 1e9, "link": link * 1e9, "network": network * 1e9, "host_link": host * 1e9}
    return GPU(name=name, memory=gib * GIB, flops=tflops * 1e12, **rates)


# Memory: what PyTorch's out-of-memory messages call total capacity, 1-8 % below the name (ECC, driver).
# Network: the reference systems' adapters, 200 Gb/s per GPU in DGX A100, 400 Gb/s in DGX H100, H200 and B200; for cards
# without a reference system, 100 Gb/s (L40S) and 25 Gb/s (RTX 4090) are assumed.
GPUS = {
    each.name: each
    for each in (
        # NVIDIA A100 data sheet (SXM): BF16 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s both ways, PCIe 4
        gpu("a100-40gb", 39.4, 312, 1555, 300, 25, 32),
        gpu("a100-80gb", 79.1, 312, 2039, 300, 25, 32),
        # NVIDIA H100 data sheet (SXM): BF16 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways, PCIe 5
        gpu("h100-80gb", 79.1, 989.4, 3350, 450, 50, 64),
        # NVIDIA H200 data sheet: as H100 with 141 GB at 4.8 TB/s
        gpu("h200-141gb", 139.7, 989.4, 4800, 450, 50, 64),
        # NVIDIA HGX B200 data sheet: BF16 4.5 PFLOPS with sparsity, 8 TB/s (the driver reports 7.7: pytorch/ao#4002),
        # NVLink 1.8 TB/s both ways
        gpu("b200-180gb", 178.3, 2250, 7700, 900, 50, 64),
        # NVIDIA L40S data sheet: BF16 362 TFLOPS dense, 864 GB/s, PCIe 4
        gpu("l40s-48gb", 44.4, 362, 864, 32, 12.5, 32),
        # NVIDIA Ada whitepaper, RTX 4090: BF16 with FP32 accumulation 165.2 TFLOPS dense, 1,008 GB/s, PCIe 4
        gpu("rtx4090-24gb", 23.6, 165.2, 1008, 32, 3.125, 32),
    )
}
CORE_FLOPS = 80e9  # float32: 2.5 GHz, two AVX2 units of 8 lanes, multiply and add
CPU_BANDWIDTH = 20e9  # bytes/s: one DDR4 channel (DDR4-2666: 21.3 GB/s)


def find_gpu(name: str) -> GPU:
    """By name, its number alone where that is enough ("h100"), or "cpu": this machine. Raises ConfigError."""
    plain = name.lower().replace("_", "-").replace(" ", "-")
    if plain == "cpu":
        return this_cpu()
    found = [known for known in GPUS if plain in (known, known.partition("-")[0])]
    if len(found) != 1:
        raise ConfigError(f"gpu={name} is {'several' if found else 'not known'}.{nearest(plain, [*GPUS, 'cpu'])}")
    return GPUS[found[0]]


def this_cpu() -> GPU:
    """This machine as one device: its main memory and cores; rates are orders of magnitude."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rates = dict.fromkeys(("link", "network", "host_link", "bandwidth"), CPU_BANDWIDTH)
    return GPU(name="cpu", memory=memory, flops=CORE_FLOPS * (os.cpu_count() or 1), **rates)
