"""What a benchmark ran on."""

import platform
from pathlib import Path

import torch


def describe_machine(device):
    """Name the processor or GPU, the threads and the version of torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor() or platform.machine()} ({_matrix_units()})"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _matrix_units():
    """Which instructions multiply bfloat16 matrices, which is most of what training time depends on."""
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = [name for name in ("amx_tile", "avx512_bf16", "avx512_f", "avx2") if flags.get(name)]
    return names[0] if names else "no known vector instructions"
