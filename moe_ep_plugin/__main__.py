"""``python -m moe_ep_plugin``: version, what was built, and which backends can run here."""

from __future__ import annotations

import platform

import torch

from . import __version__
from ._extension import build_info, load_host
from .errors import BackendUnavailable


def main() -> None:
    """Print the report."""
    print(f"moe_ep_plugin {__version__}; torch {torch.__version__}; Python {platform.python_version()}")
    for name, part in build_info().get("parts", {"build": {"built": False, "note": "no record"}}).items():
        print(f"  built with {name}: {'yes' if part['built'] else 'no'} ({part['note']})")
    try:
        load_host()
        print("  backend host: available")
    except BackendUnavailable as error:
        print(f"  backend host: {error}")
    collective = torch.distributed.is_available()
    print(f"  backend collective: {'available' if collective else 'this torch has no torch.distributed'}")
    cuda = build_info().get("parts", {}).get("cuda", {"note": "the package was not built"})
    print(f"  backend cuda: not available ({cuda['note']})")


if __name__ == "__main__":
    main()
