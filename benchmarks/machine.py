"""What a figure was measured on: processor, versions, commit, and the memory that it took."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "stnerp",
    "torch",
    "numpy",
    "SimpleITK",
    "antspyx",
    "itk-elastix",
    "picsl_greedy",
    "convexAdam",
    "fireants",
)


def machine() -> dict[str, str | int]:
    """Hardware, versions, date (UTC) and commit, one entry each."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def peak_memory_mib() -> float:
    """The most that this process has held so far, or a child of it that has ended, if that was more."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(_high_water_mark_kib() or own, child) * unit / 2**20


def peak_gpu_memory_mib() -> float:
    """The most that PyTorch has held on the GPU so far; 0 without one."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def wait_for_gpu() -> None:
    """Before a clock is read: what was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _high_water_mark_kib() -> int | None:
    """VmHWM, on Linux: there `ru_maxrss` begins with what the parent held when it started this process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), None)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Short hash of the checkout, with a + where files differ from it."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changes else "")
