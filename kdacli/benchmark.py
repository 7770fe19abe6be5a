"""What the scripts in benchmarks/ begin with."""

import os
import sys
from pathlib import Path

import torch

from kda_kernels.errors import KdaError, UnavailableError
from kdacli import output
from kdacli.main import explain


def ready(dest: str | os.PathLike[str] | None, force: bool) -> None:
    """Ends the process by one line where a record would be lost (exit code 2) or there is no GPU (3).

    Args:
        dest: where the record goes, if anywhere. force: an existing file may be overwritten.
    """
    try:
        output.check_dest(dest, force)
        if not torch.cuda.is_available():
            raise UnavailableError(f"{Path(sys.argv[0]).name} needs a CUDA GPU and there is none")
    except KdaError as error:
        message, code = explain(error)
        output.say(message, stderr=True)
        sys.exit(code)
