"""What `cute.compile` returns, as far as the compile cache knows it: it is called, and exports an object file.

The object file is a real one, made by the C compiler: a function that returns a number, called through TVM-FFI.
Run as a program (cache folder is in KDA_CACHE_DIR): makes the key "one" and prints what its function returns.

    python fake_compiled.py LOG        LOG: a line is added to it by each build
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SOURCE = """
#include <stdint.h>
typedef struct { int32_t type; int32_t padding; int64_t value; } Any;
int __tvm_ffi_%s(void *self, const Any *arguments, int32_t count, Any *result) {
    result->type = 1; result->padding = 0; result->value = %d; return 0;
}
"""


class FakeCompiled:
    """Attributes: number: what a call returns. exported: the files it was asked to write."""

    def __init__(self, number: int):
        self.number, self.exported = number, []

    def __call__(self) -> int:
        return self.number

    def export_to_c(self, object_file_path: str, function_name: str) -> None:
        self.exported.append(Path(object_file_path))
        command = ["cc", "-fPIC", "-x", "c", "-c", "-o", object_file_path, "-"]
        subprocess.run(command, input=SOURCE % (function_name, self.number), text=True, check=True)


class Build:
    """A `build` that counts its calls, and can be slow."""

    def __init__(self, number: int = 1, seconds: float = 0.0, during: Callable[[], None] = lambda: None):
        self.number, self.seconds, self.during = number, seconds, during
        self.calls, self.made = 0, []

    def __call__(self) -> FakeCompiled:
        self.calls += 1
        self.during()
        time.sleep(self.seconds)
        self.made.append(FakeCompiled(self.number))
        return self.made[-1]


if __name__ == "__main__":
    from kda_kernels.cute.cache import CACHE

    def note() -> None:
        with open(sys.argv[1], "a") as log:
            log.write("built\n")

    function = CACHE.make("one", "one", Build(41, 0.5, note))
    print(function(), *(entry.origin for entry in CACHE.entries()))
