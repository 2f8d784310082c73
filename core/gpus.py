"""Lists the peak FLOP/s of dense matrix products (for MFU) and the memory of GPUs, from NVIDIA's data sheets.

Sources, read 2026-11: A100 data sheet (2021): 312 TFLOP/s bf16; H100 data sheet (2023): 989 SXM, 756 PCIe; H200 data
sheet (2024): 989; GH200 data sheet (2024): 989 (the GPU is an H100 with HBM3/HBM3e); L4: 121; L40S: 362; A10: 125; V100
(fp16): 125; RTX 4090 (Ada white paper, fp32 accumulation): 165.
"""

# The first entry whose name occurs in the device's name is used, so longer names come first.
_PEAK_BF16_TFLOPS = (
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),  # dense fp16, from AWS's page of g5
    ("A10", 125.0),
    ("V100", 125.0),
    ("RTX 4090", 165.0),
)


# GPUs with fp8 units: compute capability 8.9 (Ada) and above.
_WITH_FP8 = frozenset({"H100", "H200", "GH200", "L4", "L40S"})

# Memory in GB (10^9 bytes) by the GPU's name in SkyPilot's catalog, from the same sheets. The A10G's figure is from
# AWS's page of g5, read 2026-11. GH200 means Lambda's GH200, which has HBM3. The driver reports slightly more or less
# memory than this.
_MEMORY_GB = {
    "A100": 40,
    "A100-80GB": 80,
    "H100": 80,
    "H200": 141,
    "GH200": 96,
    "A10": 24,
    "A10G": 24,
    "L4": 24,
    "L40S": 48,
}


def memory_bytes(accelerator: str) -> float | None:
    """Memory in bytes of an accelerator of SkyPilot's catalog, or None if the accelerator is not in the table."""
    gb = _MEMORY_GB.get(accelerator)
    return None if gb is None else gb * 1e9


def has_fp8(accelerator: str) -> bool | None:
    """Whether an accelerator of SkyPilot's catalog has fp8 units, or None if the accelerator is not in the table."""
    return accelerator in _WITH_FP8 if accelerator in _MEMORY_GB else None


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s by the device's name, or None if it is not in the table."""
    for name, tflops in _PEAK_BF16_TFLOPS:
        if name.lower() in device_name.lower():
            return tflops * 1e12
    return None
