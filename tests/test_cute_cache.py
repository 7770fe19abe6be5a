"""The compile cache of the CuTe kernels: threads, processes, bounds, files. No GPU is needed."""

import gc
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import fake_compiled
import pytest
from fake_compiled import Build, FakeCompiled
from filelock import FileLock

from kda_kernels.cute import cache as module
from kda_kernels.cute.cache import CompileCache
from kda_kernels.cute.decode import host as decode
from kda_kernels.cute.runtime import missing_packages
from kda_kernels.errors import UnavailableError
from kda_kernels.problem import Op, Problem
from kda_kernels.variant import H100

needs_dsl = pytest.mark.skipif(missing_packages() is not None, reason=str(missing_packages()))
needs_linker = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def memory(monkeypatch) -> None:
    monkeypatch.setenv("KDA_CACHE_DIR", "")


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """Where the files will lie."""
    monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return module.directory()


def in_threads(count: int, work) -> list:
    """What `work(i)` returned or raised in each of so many threads that start together."""
    barrier, results = threading.Barrier(count), [None] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread waits for ever"
    return results


def must_not_build():
    raise AssertionError("built again")


# --- in memory


def test_sixteen_threads_build_a_new_key_once(memory):
    cache, build = CompileCache(), Build(7, seconds=0.1)
    functions = in_threads(16, lambda i: cache.make("key", "label", build))
    assert build.calls == 1
    assert {id(function) for function in functions} == {id(build.made[0])}
    (entry,) = cache.entries()
    assert (entry.label, entry.origin, entry.function()) == ("label", "compiled", 7)
    assert entry.seconds >= 0.1


def test_several_keys_at_once(memory):
    """Each is built once, and by one thread at a time: the compiler is not thread-safe."""
    cache, running, together = CompileCache(), [], []

    def during() -> None:
        running.append(1)
        together.append(len(running))
        time.sleep(0.005)
        running.pop()

    builds = [Build(number, during=during) for number in range(6)]
    functions = in_threads(24, lambda i: cache.make(i % 6, f"label {i % 6}", builds[i % 6]))
    assert [function() for function in functions] == [i % 6 for i in range(24)]
    assert [build.calls for build in builds] == [1] * 6
    assert max(together) == 1
    assert len(cache.entries()) == 6


def test_nobody_gets_half_an_entry(memory):
    """While a key is being built it is not there; the moment it is there it works."""
    cache, seen = CompileCache(), []
    build = Build(3, during=lambda: seen.append(cache.get("key")))
    assert cache.get("key") is None
    assert cache.make("key", "label", build)() == 3
    assert seen == [None]
    assert cache.get("key")() == 3


def test_a_key_that_is_there_is_not_built(memory):
    cache = CompileCache()
    first = cache.make("key", "label", Build())
    assert cache.make("key", "label", must_not_build) is first


def test_bounded_and_the_one_asked_for_longest_ago_goes_first(memory):
    cache = CompileCache(capacity=3)
    for key in "abc":
        cache.make(key, key, Build())
    cache.get("a")
    cache.make("b", "b", must_not_build)  # asking to make it is asking for it
    cache.make("d", "d", Build())
    assert [entry.label for entry in cache.entries()] == ["a", "b", "d"]
    assert cache.get("c") is None
    cache.make("c", "c", Build())
    assert [entry.label for entry in cache.entries()] == ["b", "d", "c"]


def test_the_bound_can_be_set(memory, monkeypatch):
    assert CompileCache().capacity == 256
    monkeypatch.setenv("KDA_CUTE_CACHE_SIZE", "2")
    cache = CompileCache()
    for key in range(5):
        cache.make(key, str(key), Build())
    assert [entry.label for entry in cache.entries()] == ["3", "4"]


def test_entries_and_clear(memory):
    cache = CompileCache()
    assert cache.entries() == []
    cache.make("a", "label a", Build())
    cache.make("b", "label b", Build())
    cache.get("a")
    assert [entry.label for entry in cache.entries()] == ["label b", "label a"]
    cache.clear()
    assert cache.entries() == [] and cache.get("a") is None
    again = Build()
    cache.make("a", "label a", again)
    assert again.calls == 1


@pytest.mark.parametrize("forget", ["evict", "clear"])
def test_what_is_forgotten_stays_loaded(memory, forget):
    """A CUDA graph may still call its code."""
    cache = CompileCache(capacity=1)
    alive = weakref.ref(cache.make("a", "a", Build()))
    if forget == "evict":
        cache.make("b", "b", Build())
    else:
        cache.clear()
    assert cache.get("a") is None
    gc.collect()
    assert alive() is not None


def test_a_failing_build_raises_for_all_who_wait_and_the_next_call_tries_again(memory):
    cache, calls = CompileCache(), []

    def fails():
        calls.append(1)
        time.sleep(0.3)
        raise ZeroDivisionError("the compiler's own words")

    errors = in_threads(16, lambda i: cache.make("key", "label", fails))
    assert [type(error) for error in errors] == [ZeroDivisionError] * 16
    assert {str(error) for error in errors} == {"the compiler's own words"}
    assert len(calls) < 16, "those who waited did not compile it again, one after the other"
    assert cache.entries() == [] and cache.get("key") is None
    assert cache.make("key", "label", Build(5))() == 5
    assert in_threads(4, lambda i: cache.make("key", "label", must_not_build)()) == [5] * 4


def test_a_build_that_is_interrupted_leaves_nothing_locked(memory):
    cache = CompileCache()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.make("key", "label", interrupted)
    assert in_threads(2, lambda i: cache.make("key", "label", Build(5))()) == [5, 5]
    assert cache.make("other", "other", Build(6))() == 6


def test_asking_while_others_come_and_go(memory):
    """`get` and `entries` take no lock: they must stand whatever happens at the same time."""
    cache = CompileCache(capacity=4)

    def work(i: int) -> None:
        for n in range(60):
            key = (i * 7 + n) % 10
            assert cache.make(key, str(key), Build(key))() == key
            function = cache.get(key)
            assert function is None or function() == key
            assert len(cache.entries()) <= 5
            if n % 20 == i:
                cache.clear()

    assert in_threads(8, work) == [None] * 8
    assert len(cache.entries()) <= 4


# --- on disk


@needs_dsl
@needs_linker
class TestDisk:
    def test_a_second_cache_loads_what_the_first_made(self, folder):
        first = CompileCache()
        assert first.make("key", "label", Build(7))() == 7
        assert [entry.origin for entry in first.entries()] == ["compiled"]
        second = CompileCache()
        assert second.make("key", "label", must_not_build)() == 7
        assert [entry.origin for entry in second.entries()] == ["disk"]
        first.clear()
        assert first.make("key", "label", must_not_build)() == 7

    def test_the_key_is_for_memory_and_the_label_for_disk(self, folder):
        CompileCache().make("key", "label", Build(1))
        assert CompileCache().make("key", "another label", Build(2))() == 2
        assert CompileCache().make("another key", "label", must_not_build)() == 1

    def test_sixteen_threads_load_once(self, folder):
        CompileCache().make("key", "label", Build(7))
        cache = CompileCache()
        functions = in_threads(16, lambda i: cache.make("key", "label", must_not_build))
        assert len({id(function) for function in functions}) == 1
        assert functions[0]() == 7

    def test_files_are_written_under_another_name_first(self, folder):
        during = []
        target = folder / f"{hashlib.sha256(b'label').hexdigest()[:32]}.so"

        class Watched(FakeCompiled):
            def export_to_c(self, object_file_path: str, function_name: str) -> None:
                super().export_to_c(object_file_path, function_name)
                during.extend(folder.iterdir())

        build = Watched(7)
        CompileCache().make("key", "label", lambda: build)
        assert target.with_suffix(".o") not in during and target not in during
        assert not build.exported[0].exists()
        assert sorted(folder.iterdir()) == [target.with_suffix(".lock"), target]

    def test_a_process_that_dies_while_it_writes_leaves_no_half_file(self, folder):
        class Dies(FakeCompiled):
            def export_to_c(self, object_file_path: str, function_name: str) -> None:
                Path(object_file_path).write_bytes(b"half")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            CompileCache().make("key", "label", lambda: Dies(1))
        assert [file.suffix for file in folder.iterdir()] == [".lock"]
        assert CompileCache().make("key", "label", Build(2))() == 2

    @pytest.mark.parametrize("damage", [0, 10, 100, 0.3, 0.6, 0.95, -33, -1, "byte", "text", "trailer"])
    def test_a_damaged_file_is_made_again(self, folder, damage):
        """Loading a shared library that was cut off ends the process: it must not come to that."""
        module.keep(FakeCompiled(1), "label")
        (file,) = folder.glob("*.so")
        content = file.read_bytes()
        if damage == "byte":
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        elif damage == "text":
            content = b"#!/bin/sh\n"
        elif damage == "trailer":
            content += b"more"
        else:
            content = content[: int(damage * len(content)) if isinstance(damage, float) else damage]
        file.write_bytes(content)
        cache, build = CompileCache(), Build(2)
        with pytest.warns(RuntimeWarning, match=rf"compile cache: {file.name} does not load .*: made again"):
            assert cache.make("key", "label", build)() == 2
        assert build.calls == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert CompileCache().make("key", "label", must_not_build)() == 2

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
    def test_a_folder_that_others_may_write_to_is_not_used(self, folder, mode):
        """What lies there is run."""
        CompileCache().make("key", "label", Build(1))
        folder.chmod(mode)
        before = sorted(folder.iterdir())
        build = Build(2)
        with pytest.warns(RuntimeWarning, match=f"no compile cache on disk: others may write to {folder}"):
            assert CompileCache().make("key", "label", build)() == 2
        with pytest.warns(RuntimeWarning, match="others may write to"):
            CompileCache().make("other", "other", Build(3))
        assert sorted(folder.iterdir()) == before

    def test_a_folder_of_somebody_else_is_not_used(self, folder, monkeypatch):
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
        with pytest.warns(RuntimeWarning, match="others may write to"):
            assert CompileCache().make("key", "label", Build(1))() == 1
        assert list(folder.iterdir()) == []

    def test_a_folder_that_cannot_be_written_to_is_not_used(self, folder, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.warns(RuntimeWarning, match="cannot be written to"):
            assert CompileCache().make("key", "label", Build(1))() == 1

    def test_a_folder_that_cannot_be_made(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("KDA_CACHE_DIR", str(tmp_path / "file"))
        with pytest.warns(RuntimeWarning, match="no compile cache on disk: .*Not a directory"):
            assert CompileCache().make("key", "label", Build(1))() == 1

    def test_no_room_on_disk(self, folder):
        class Full(FakeCompiled):
            def export_to_c(self, object_file_path: str, function_name: str) -> None:
                Path(object_file_path).write_bytes(b"half")
                raise OSError(28, "No space left on device")

        with pytest.warns(RuntimeWarning, match="was not written .*No space left on device"):
            assert CompileCache().make("key", "label", lambda: Full(1))() == 1
        assert [file.suffix for file in folder.iterdir()] == [".lock"]

    def test_no_folder_means_memory_only(self, monkeypatch, tmp_path):
        monkeypatch.setenv("KDA_CACHE_DIR", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        assert module.directory() is None
        build = Build(1)
        CompileCache().make("key", "label", build)
        module.keep(build.made[0], "label")
        assert build.made[0].exported == [] and list(tmp_path.iterdir()) == []

    def test_where_files_lie(self, monkeypatch, tmp_path):
        monkeypatch.delenv("KDA_CACHE_DIR", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert module.directory().parent == tmp_path / "xdg" / "kda" / "cute"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert module.directory().parent == tmp_path / "home" / ".cache" / "kda" / "cute"
        CompileCache().make("key", "label", Build(1))
        assert module.directory().stat().st_mode & 0o777 == 0o700

    def test_keep_puts_it_where_a_launch_looks_and_replaces_nothing(self, folder):
        module.keep(FakeCompiled(3), "label")
        assert CompileCache().make("key", "label", must_not_build)() == 3
        unused = FakeCompiled(4)
        module.keep(unused, "label")
        assert unused.exported == []
        assert CompileCache().make("key", "label", must_not_build)() == 3

    def test_the_oldest_files_go(self, folder, monkeypatch):
        monkeypatch.setattr(module, "DISK_FILES", 3)
        for age, label in enumerate("abcd"):
            CompileCache().make(label, label, Build(age))
            for file in folder.glob("*.so"):
                os.utime(file, (file.stat().st_atime - 100, file.stat().st_mtime - 100))
        assert len(list(folder.glob("*.so"))) == 3
        rebuilt = Build(0)
        assert CompileCache().make("b", "b", must_not_build)() == 1
        CompileCache().make("a", "a", rebuilt)
        assert rebuilt.calls == 1

    def test_a_compiler_with_options(self, folder, monkeypatch):
        monkeypatch.setenv("CC", "cc -pthread")
        CompileCache().make("key", "label", Build(1))
        assert len(list(folder.glob("*.so"))) == 1

    def test_two_processes_compile_once(self, folder, tmp_path):
        log = tmp_path / "log"
        command = [sys.executable, fake_compiled.__file__, str(log)]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(2)]
        said = sorted(process.communicate(timeout=60)[0].strip() for process in both)
        assert said == ["41 compiled", "41 disk"]
        assert log.read_text() == "built\n"


# --- what a file depends on


@needs_dsl
class TestFingerprint:
    @pytest.fixture
    def sources(self, monkeypatch, tmp_path) -> Path:
        """A copy of the folder, which the module takes for its own."""
        copy = tmp_path / "cute"
        shutil.copytree(Path(module.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(module, "__file__", str(copy / "cache.py"))
        return copy

    def test_the_same_sources_give_the_same(self, sources):
        assert module.fingerprint.__wrapped__() == module.fingerprint()

    @pytest.mark.parametrize("name", ["decode/kernel.py", "math.py", "decode/build.py", "prefill/config.py"])
    def test_a_change_of_a_source(self, sources, name):
        with (sources / name).open("a") as file:
            file.write("\n# changed\n")
        assert module.fingerprint.__wrapped__() != module.fingerprint()

    def test_a_new_source(self, sources):
        (sources / "more.py").touch()
        assert module.fingerprint.__wrapped__() != module.fingerprint()

    @pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "apache-tvm-ffi"])
    def test_another_version_of_a_package(self, monkeypatch, package):
        installed = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "99" if name == package else installed(name))
        assert module.fingerprint.__wrapped__() != module.fingerprint()

    def test_it_is_in_the_path(self, folder):
        assert re.fullmatch(r"[0-9a-f]{16}", folder.name)
        assert module.fingerprint().startswith(folder.name)


# --- with the real compiler

SPEC = decode._problem_spec(Problem(Op.DECODE, (1,), H=1, HV=1, K=32, V=32, packed=False, pool_slots=1), H100)
LOAD = """
import sys
from kda_kernels.cute import cache
from kda_kernels.cute.decode import host as decode

def build():
    raise AssertionError("compiled again")

function = cache.CACHE.make("key", sys.argv[1], build)
try:
    function()
except TypeError as error:
    assert "__call__(q: Tensor([n0, 1, n1, 32], bfloat16)" in str(error), error
else:
    raise AssertionError("ran without arguments")
assert [entry.origin for entry in cache.CACHE.entries()] == ["disk"]
print("cutlass" in sys.modules)
"""


@pytest.fixture(scope="module")
def built():
    return decode.build(SPEC, "sm_90a")


@needs_dsl
class TestReal:
    @pytest.mark.parametrize(
        ("compiler", "kind", "imports"),
        [
            pytest.param("cc", ".so", "False", marks=needs_linker),
            ("/no/such/compiler", ".o", None),
            ("false", ".o", "True"),
        ],
    )
    def test_a_new_process_loads_it(self, folder, monkeypatch, built, compiler, kind, imports):
        """Where it could be linked, without importing the DSL."""
        monkeypatch.setenv("CC", compiler)
        label = decode.label(SPEC, "sm_90a")
        CompileCache().make("key", label, lambda: built)
        assert [file.suffix for file in folder.iterdir() if file.suffix != ".lock"] == [kind]
        if imports is None:  # one object file loads as another
            return
        done = subprocess.run(
            [sys.executable, "-c", LOAD, label], capture_output=True, text=True, env=environment(), timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [imports]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}


@needs_linker
def test_a_lock_that_is_held_too_long_ends_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(module, "LOCK_S", 0.05)
    cache, build = module.CompileCache(), Build(7)
    path = module._path("two")
    with FileLock(f"{path}.lock"), pytest.raises(UnavailableError, match="^another process has compiled the same"):
        cache.make("two", "two", build)
    assert build.calls == 0
    assert cache.make("two", "two", build)() == 7, "the next call tries again"


@needs_linker
def test_files_that_nobody_uses_are_removed(folder, monkeypatch):
    """Of other sources and compilers, too; not those that were asked for since."""
    long_ago = time.time() - (module.UNUSED_DAYS + 1) * 86400
    cache = module.CompileCache()
    cache.make("used", "used", Build(1))
    used = module._path("used").with_suffix(".so")
    other = module.directory().parent / "0123456789abcdef"
    other.mkdir()
    for file in (other / "old.so", other / "old.lock", used):
        file.touch()
        os.utime(file, (long_ago, long_ago))
    module.CompileCache().make("used", "used", Build(1))  # found, and in use again
    module.CompileCache().make("new", "new", Build(2))
    assert used.exists() and not other.exists()
