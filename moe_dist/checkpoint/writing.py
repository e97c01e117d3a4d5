"""Files of tensors, written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

NUMBER = re.compile(r"\(os error (\d+)\)")  # how the library tells what the system said


@contextmanager
def system_errors() -> Iterator[None]:
    """An OSError where a file of safetensors can't be written: the library has an error of its own for a full disk."""
    try:
        yield
    except SafetensorError as error:
        number = NUMBER.search(str(error))
        if number is None:
            raise OSError(str(error)) from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A file of safetensors as transformers reads it. Raises OSError."""
    with system_errors():
        save_file(tensors, path, metadata={"format": "pt"})
