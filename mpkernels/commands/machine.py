"""What this machine is: processor, GPU, versions, and the name under which results are recorded."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import mpkernels
from mpkernels import library

# of those that the kernel lists, the ones that vectorised code asks for
_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "bf16", "sve", "sve2"),
)


def devices() -> list[str]:
    """The device types that exist here: "cpu", and "cuda" where torch sees a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _cpuinfo(field: str) -> str | None:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return None


def processor() -> str:
    """The processor's name, as its maker writes it."""
    found = _cpuinfo("model name")
    if found is None and platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Vector extensions of the processor: as the compiled module sees them, else as the kernel lists them."""
    host = library.host_module()
    if host is not None:
        return sorted(host.cpu_features())
    flags = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return [feature for feature in _FEATURES if feature in flags]


def gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.cuda.get_device_name(i) for i in range(count)]


def versions() -> dict[str, str | None]:
    """Versions of everything that decides what runs; None: not installed."""

    def installed(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "mpkernels": mpkernels.__version__,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def slug(text: str) -> str:
    """Lower case, words joined by hyphens, without the decoration of product names.

    >>> slug("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    'intel-xeon-platinum-8481c'
    >>> slug("AMD EPYC 7763 64-Core Processor")
    'amd-epyc-7763'
    """
    text = re.sub(r"\((R|TM|C)\)|@.*|\b(\d+-Core|CPU|Processor)\b", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def name(device: str = "cpu") -> str:
    """The name of the folder in which this machine's results are recorded: processor and threads, or the GPU."""
    if device == "cuda":
        return slug(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"{slug(processor())}-{threads}-thread{'' if threads == 1 else 's'}"


def load() -> float | None:
    """Processes that wanted to run in the last minute, on average; timings suffer where that exceeds the cores."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe() -> dict:
    """All of it, for JSON."""
    return {
        "processor": processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cpu_features": cpu_features(),
        "instruction_set": library.instruction_set(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpus": gpus(),
    }
