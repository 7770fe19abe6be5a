"""Runs at the start of every Python process of a captured program: this folder stands first in its PYTHONPATH.

Makes kdacli and kda_kernels importable (those two only), starts the capture, and then runs the sitecustomize that this
one hides, if there is one.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


class OnlyOurs:
    """Finds the packages that the capture needs where the command `kda` has them."""

    def __init__(self, roots):
        self.roots = roots

    def find_spec(self, name, path=None, target=None):
        root = self.roots.get(name)
        return importlib.machinery.PathFinder.find_spec(name, [root]) if root else None


def start():
    try:
        roots = dict(item.split("=", 1) for item in os.environ["KDA_CAPTURE_ROOTS"].split(os.pathsep))
        sys.meta_path.append(OnlyOurs(roots))
        from kdacli.capture import session
    except Exception as error:
        print(f"kda capture: cannot record in this process: {type(error).__name__}: {error}", file=sys.stderr)
        return
    session.start()


def run_hidden():
    """The sitecustomize that Python would have run without us."""
    paths = [path for path in sys.path if os.path.abspath(path or os.getcwd()) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", paths)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if os.environ.get("KDA_CAPTURE"):
    start()
run_hidden()
