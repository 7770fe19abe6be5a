"""PTX text to a list of statements, with names of inline assembly made unique and labels resolved."""

import dataclasses
import re

from ptx.memory import PARAMETER_BYTES, PARAMETERS

_STATEMENT = re.compile(r"\s*(?:(\{)|(\})|([$\w]+):(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_NAME = r"(?<![\w.%$]){}(?!\w)"


@dataclasses.dataclass
class Statement:
    """An instruction.

    Attributes:
        opcode: with its modifiers. operands: as written. target: of a branch, an index.
        guard: the predicate of `@guard`, or None. negated: whether it is `@!guard`.
    """

    opcode: str
    operands: list[str]
    guard: str | None = None
    negated: bool = False
    target: int | None = None

    def __str__(self) -> str:
        return f"{self.opcode} {', '.join(self.operands)}"


def parse(text: str) -> tuple[list[Statement], list[int]]:
    """The statements of the one kernel in the text, and the bytes of each of its parameters."""
    text = re.sub(r"//[^\n]*", "", text)
    head, signature, body = re.match(r"(.*?)\.entry\s+\w+\((.*?)\)[^{]*\{(.*)", text, re.S).groups()
    parameters = re.findall(r"\.param\s.*?\.([a-z])(\d+)\s+(\w+)(?:\[(\d+)\])?", signature)
    addresses = {name: PARAMETERS + n * PARAMETER_BYTES for n, (*_, name, _) in enumerate(parameters)}
    addresses |= dict.fromkeys(re.findall(r"\.extern \.shared .*?(\w+)\[\]", head), 0)
    body = re.sub(r"[A-Za-z_]\w*", lambda m: str(addresses.get(m[0], m[0])), body)
    return _statements(body), [int(bits) // 8 * int(count or 1) for _, bits, _, count in parameters]


def _statements(body: str) -> list[Statement]:
    found, labels, branches = [], {}, []
    scopes: list[tuple[int, set[str]]] = []  # of inline assembly: a number, and the registers that it declares
    at = blocks = 0
    while scope := _STATEMENT.match(body, at):
        at = scope.end()
        opens, closes, label, line = scope.groups()
        if opens:
            blocks += 1
            scopes.append((blocks, set()))
        elif closes:
            if not scopes:
                break
            scopes.pop()
        elif label:
            labels[(*(number for number, _ in scopes), label)] = len(found)
        elif (line := line.strip()).startswith(".reg"):
            if scopes:
                scopes[-1][1].update(re.findall(r"[\w%]+", line.split(None, 2)[2]))
        elif line and not line.startswith("."):
            found.append(_statement(_renamed(line, scopes)))
            branches.append(tuple(number for number, _ in scopes))
    for one, inside in zip(found, branches, strict=True):
        if one.opcode.split(".")[0] == "bra":
            one.target = next(
                labels[key] for n in range(len(inside), -1, -1) if (key := (*inside[:n], one.operands[0])) in labels
            )
    return found


def _renamed(line: str, scopes: list[tuple[int, set[str]]]) -> str:
    for number, names in reversed(scopes):
        for name in names:
            line = re.sub(_NAME.format(name), f"%{name}_{number}", line)
    return line


def _statement(line: str) -> Statement:
    guard = re.match(r"@(!?)(\S+)\s+(.*)", line, re.S)
    opcode, *rest = (guard[3] if guard else line).split(None, 1)
    operands = split(rest[0]) if rest else []
    return Statement(opcode, operands, guard and guard[2], bool(guard and guard[1]))


def split(operands: str) -> list[str]:
    """At commas outside of brackets: `{%r1, %r2}, [%r3]` is two."""
    return [one.strip() for one in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", operands)]


def elements(operand: str) -> list[str]:
    """Those of `{a, b}`; of an operand that is no vector, itself."""
    return [one.strip() for one in operand.strip("{} ").split(",")]
