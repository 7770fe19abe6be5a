"""Instructions of bulk copies: loads that an mbarrier waits for, and stores in groups."""

import re

import numpy as np

from ptx.instructions import Run, address, instruction, value
from ptx.memory import PARAMETER_BYTES, PARAMETERS
from ptx.parsing import Statement


def _box(operand: str):
    """Of `[descriptor, {coordinates}]`: a function of warp and lane that gives the `TensorMap` and the coordinates."""
    descriptor, inside = re.match(r"\[([^,]+),\s*\{(.*)\}\]", operand).groups()
    where, coordinates = value(descriptor, "u64"), [value(one.strip()) for one in inside.split(",")]

    def box(warp, lane):
        parameter = (int(where(warp)[lane]) - PARAMETERS) // PARAMETER_BYTES
        return warp.cta.maps[parameter], [int(one(warp)[lane].view(np.int32)) for one in coordinates]

    return box


@instruction("cp.async.bulk.tensor")
def _copy_box(statement: Statement) -> Run:
    first, second, *further = statement.operands
    if ".global.shared::cta." in statement.opcode:
        source, box = address(second), _box(first)

        def store(warp):
            for lane in warp.active():
                tensor, coordinates = box(warp, lane)
                where = int(source(warp)[lane])
                warp.stores.issue(lambda t=tensor, c=coordinates, w=where: t.store(warp.cta, c, w))

        return store
    box, target, mbarrier = _box(second), address(first), address(further[0])

    def load(warp):
        for lane in warp.active():
            tensor, coordinates = box(warp, lane)
            where = (coordinates, int(target(warp)[lane]), int(mbarrier(warp)[lane]))
            warp.cta.loads.append(lambda t=tensor, w=where: t.load(warp.cta, *w))

    return load


@instruction("cp.async.bulk.global.shared::cta")
def _copy_bytes(statement: Statement) -> Run:
    target, source, count = address(statement.operands[0]), address(statement.operands[1]), value(statement.operands[2])

    def copy(warp, to, where, n):
        warp.cta.spaces["global"].bytes(to, n)[:] = warp.cta.spaces["shared"].bytes(where, n)

    def store(warp):
        for lane in warp.active():
            to, where, n = (int(one(warp)[lane]) for one in (target, source, count))
            warp.stores.issue(lambda t=to, w=where, n=n: copy(warp, t, w, n))

    return store


@instruction("cp.async.bulk.commit_group", "wgmma.commit_group")
def _commit(statement: Statement) -> Run:
    if statement.opcode.startswith("wgmma"):
        return lambda warp: warp.products.commit()
    return lambda warp: warp.stores.commit()


@instruction("cp.async.bulk.wait_group", "wgmma.wait_group")
def _wait_for_groups(statement: Statement) -> Run:
    left = int(statement.operands[0])
    if statement.opcode.startswith("wgmma"):
        return lambda warp: warp.products.wait(left)
    return lambda warp: warp.stores.wait(left)
