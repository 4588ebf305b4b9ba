"""float32 means float32, whatever the model under test set for the process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 products are float32: TF32, bfloat16 and autocast off inside, as they were before afterwards."""
    import torch

    restore = _restorer()
    torch.set_float32_matmul_precision("highest")  # "medium" means bfloat16 on some CPUs
    try:
        with (
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        restore()


def _restorer() -> Callable[[], None]:
    """A function that brings the present precision of matrix products back, whichever of torch's two ways set it."""
    import torch

    try:
        precision = torch.get_float32_matmul_precision()
        return lambda: torch.set_float32_matmul_precision(precision)
    except RuntimeError:  # it was set for one backend alone, which the older way cannot express
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        kept = cuda.fp32_precision, cpu.fp32_precision

        def restore() -> None:
            cuda.fp32_precision, cpu.fp32_precision = kept

        return restore
