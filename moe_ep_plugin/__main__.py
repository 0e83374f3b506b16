"""``python -m moe_ep_plugin``: version, what was built, and which backends can run here."""

from __future__ import annotations

import platform

import torch

from . import __version__
from ._extension import build_info, load_cuda, load_host
from .errors import BackendUnavailable


def host_state() -> str:
    """Whether the host backend can run."""
    load_host()
    return "available"


def collective_state() -> str:
    """Whether the fallback on torch.distributed can run."""
    return "available" if torch.distributed.is_available() else "this torch has no torch.distributed"


def cuda_state() -> str:
    """Whether the CUDA backend can run, and on what; as torch sees it."""
    load_cuda()
    if torch.version.cuda is None:
        return "this torch was built without CUDA; install one for CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:  # No driver, one that is too old, or no device: torch says which.
        return f"torch can't use CUDA: {str(error).splitlines()[0]}"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    devices = "1 device" if len(names) == 1 else f"{len(names)} devices"
    return f"available ({', '.join([devices, *dict.fromkeys(names)])})"


def main() -> None:
    """Print the report."""
    print(f"moe_ep_plugin {__version__}; torch {torch.__version__}; Python {platform.python_version()}")
    for name, part in build_info().get("parts", {"build": {"built": False, "note": "no record"}}).items():
        print(f"  built with {name}: {'yes' if part['built'] else 'no'} ({part['note']})")
    for backend, state in {"host": host_state, "collective": collective_state, "cuda": cuda_state}.items():
        try:
            print(f"  backend {backend}: {state()}")
        except BackendUnavailable as error:
            print(f"  backend {backend}: {error}")


if __name__ == "__main__":
    main()
