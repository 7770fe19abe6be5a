"""Dumps: the tensors of a KDA call in a file, under whatever names an engine gave them.

load.py reads, save.py writes; names.py is the one table of aliases. In between, files.py reads bytes into a tree within
the limits of bounds.py, folders.py and sglang.py make one of many files, said.py parses the options it states,
shapes.py and infer.py fill in what it leaves out, outputs.py takes what the engine computed; join.py puts the heads of
tensor-parallel ranks side by side.
"""

from kdacli.dumps.join import join
from kdacli.dumps.load import Dump, load, load_all
from kdacli.dumps.save import check_path, save

__all__ = ["Dump", "check_path", "join", "load", "load_all", "save"]
