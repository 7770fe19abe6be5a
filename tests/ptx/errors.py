"""What a simulated kernel can do wrong."""


class PtxError(Exception):
    """A kernel did what no GPU allows: too many arrivals, an address that is not aligned, ..."""


class DeadlockError(PtxError):
    """No warp can go on, and nothing is under way that could wake one."""
