"""Runs a compiled kernel's PTX on the CPU, for tests of device code where there is no GPU.

Modelled: the warps of one CTA, which take turns at random; lanes that diverge, of which those furthest behind go first;
shared and global memory and parameters; named barriers and mbarriers; TMA, bulk copies and wgmma, which happen at any
time between their issue and the wait for them; ldmatrix, stmatrix, mma.sync, and shared matrices of wgmma with swizzles
of 64 and 128 bytes. A read too early, a tile that is overwritten too soon and a barrier that nobody completes show as
wrong numbers or as a `DeadlockError`, in some of the orders that seeds give.

Not modelled: proxies and fences (a missing `fence.proxy.async` does not show), memory order between CTAs, which run one
after another, what ptxas makes of PTX, clusters, limits of registers, and time. A bulk store reads and writes at once.
Sums of products are of fp64, rounded once to fp32; ex2, rcp and rsqrt are exact to fp32.

`parsing` reads the text; `arithmetic` is the table of instructions of lanes by themselves; `instructions`, `matrices`
and `asynchronous` have the others; `simulation` runs them.
"""

from ptx.asynchronous import TensorMap
from ptx.errors import DeadlockError, PtxError
from ptx.memory import GlobalMemory
from ptx.simulation import Kernel

__all__ = ["DeadlockError", "GlobalMemory", "Kernel", "PtxError", "TensorMap"]
