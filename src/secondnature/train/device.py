"""A process that computes on a GPU, prepared (trainer; server of the local engine).

cuDNN stays out: what a language model would use it for (the short convolutions of a GatedDeltaNet, attention) torch
has kernels of its own for, and a library less is memory of the card less, and one source of other bits from one
version to the next. vLLM, too, keeps it out of attention.
"""

from __future__ import annotations

import torch

__all__ = ["is_lost", "prepare"]


def prepare() -> None:
    """Before the first kernel; does nothing that matters where there is no GPU."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def is_lost() -> bool:
    """Has the device failed under this process? Then no call on it will work again before a new process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
