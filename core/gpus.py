"""Peak dense matrix FLOP/s of accelerators, for MFU. From NVIDIA's data sheets, without sparsity.

Sources, read 2026-11: A100 data sheet (2021): 312 TFLOP/s bf16; H100 data sheet (2023): 989 SXM, 756 PCIe;
H200 data sheet (2024): 989; GH200 data sheet (2024): 989 (the GPU is an H100 with HBM3/HBM3e); L4: 121;
L40S: 362; A10: 125; V100 (fp16): 125; RTX 4090 (Ada white paper, fp32 accumulation): 165.
"""

# First match wins: the longer name stands before the shorter.
_PEAK_BF16_TFLOPS = (
    ("GH200", 989.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),  # AWS g5: 70 TFLOP/s dense fp16 tensor, half of the A10 (AWS g5 page)
    ("A10", 125.0),
    ("V100", 125.0),
    ("RTX 4090", 165.0),
)


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of the device that calls itself so, or None if it is not in the table."""
    for name, tflops in _PEAK_BF16_TFLOPS:
        if name.lower() in device_name.lower():
            return tflops * 1e12
    return None
