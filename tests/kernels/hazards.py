"""Hopper's asynchronous products in compiled code: does anything write an operand that is still being read?

A product (wgmma in PTX, HGMMA in SASS) may take its left operand from registers. It reads them until a wait has covered
it, and writing them before is undefined (PTX ISA, wgmma.wait_group; Triton's issue 9433 shows such code). The check
follows every path of the control flow, around loops as well. Operands in shared memory are not followed.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

Groups = tuple[
    frozenset[str], ...
]  # registers read by each group of products in flight, oldest first, the open one last


@dataclass
class _Block:
    events: list[tuple[str, object, str]] = field(default_factory=list)  # kind, registers or a number, instruction
    successors: list[str] = field(default_factory=list)


def overwritten_in_ptx(ptx: str) -> list[str]:
    """Instructions of PTX that write a register which a product in flight reads."""
    instructions = []
    for line in ptx.splitlines():
        text = line.split("//")[0].strip()
        if label := re.match(r"(\$L\w+):", text):
            instructions.append(("label", label[1]))
        elif text.endswith(";"):
            instructions.append(("code", text))
    return _overwritten(instructions, _ptx_event, r"bra\S*\s+(\$L\w+)", r"(ret|exit|trap)\b")


def overwritten_in_sass(sass: str) -> list[str]:
    """The same of SASS, which holds temporaries of ptxas that PTX does not know."""
    instructions = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            instructions.append(("label", label[1]))
        elif code := re.search(r"/\*\w{4,}\*/\s+([^;]*?)\s*;", line):
            instructions.append(("code", code[1]))
    return _overwritten(instructions, _sass_event, r"BRA\S*\s.*`\((\.L_x_\w+)\)", r"(EXIT|RET)\b")


def _ptx_event(text: str) -> tuple[str, object] | None:
    if text.startswith("wgmma.mma_async"):
        braces = re.findall(r"\{([^}]*)\}", text)
        return "product", _registers(braces[1]) if len(braces) > 1 else frozenset()
    if text.startswith("wgmma.commit_group"):
        return "commit", None
    if text.startswith("wgmma.wait_group"):
        return "wait", int(re.search(r"(\d+);", text)[1])
    if re.match(r"(st|red|bar|wgmma|mbarrier|fence|cp|bra|call|prefetch|setmaxnreg)\b", text):
        return None
    written = re.match(r"[\w.:]+\s+(?:\{([^}]*)\}|(%\w+)(?:\|%\w+)?)\s*,", text)
    return ("write", _registers(written[1] or written[2])) if written else None


def _registers(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"%\w+", text))


def _sass_event(text: str) -> tuple[str, object] | None:
    if text.startswith("HGMMA"):
        operand = re.search(r", R(\d+)(?:\.\w+)*, gdesc", text)
        kind = "product and commit" if text.endswith("gsb0") else "product"
        return kind, _numbered(int(operand[1]), 4) if operand else frozenset()
    if wait := re.match(r"WARPGROUP\.DEPBAR\S* \S+ (0x\w+)", text):
        return "wait", int(wait[1], 16)
    if written := re.match(r"(\S+)\s+(?:U?P[T\d]*, )*R(\d+),", text):
        widths = {".128": 4, ".64": 2, ".WIDE": 2, ".M88.4": 4, ".M88.2": 2}
        return "write", _numbered(int(written[2]), max([1, *(n for x, n in widths.items() if x in written[1])]))
    return None


def _numbered(first: int, count: int) -> frozenset[str]:
    return frozenset(f"R{number}" for number in range(first, first + count))


def _overwritten(instructions: list[tuple[str, str]], event, branch: str, end: str) -> list[str]:
    blocks, entry = _blocks(instructions, event, branch, end)
    found: dict[str, None] = {}
    seen: dict[str, set[Groups]] = defaultdict(set)
    waiting: list[tuple[str, Groups]] = [(entry, (frozenset(),))]
    while waiting:
        name, groups = waiting.pop()
        if groups in seen[name] or name not in blocks:
            continue
        seen[name].add(groups)
        for kind, value, text in blocks[name].events:
            groups = _after(groups, kind, value)
            if kind == "write" and any(value & group for group in groups):
                found[text] = None
        waiting += [(successor, groups) for successor in blocks[name].successors]
    return list(found)


def _after(groups: Groups, kind: str, value) -> Groups:
    *committed, now = groups
    if kind.startswith("product"):
        now = now | value
    if kind.endswith("commit"):
        return (*committed, now, frozenset())
    if kind == "wait":
        return (*committed[max(0, len(committed) - value) :], now)
    return (*committed, now)


def _blocks(instructions, event, branch: str, end: str) -> tuple[dict[str, _Block], str]:
    """Straight pieces of code by name, and the name of the first. A branch that is not predicated ends its piece."""
    blocks, name, count = {"entry": _Block()}, "entry", 0
    open_ended = True  # the piece runs into what follows
    for kind, text in instructions:
        if kind == "label":
            if open_ended:
                blocks[name].successors.append(text)
            name, open_ended = text, True
            blocks[name] = _Block()
            continue
        predicated = re.match(r"@!?[%\w]+\s+", text)
        bare = text[predicated.end() :] if predicated else text
        target = re.match(branch, bare)
        if target or re.match(end, bare):
            if target:
                blocks[name].successors.append(target[1])
            count += 1
            following = f"after {count}"
            if predicated and open_ended:
                blocks[name].successors.append(following)
            name, open_ended = following, bool(predicated)
            blocks[name] = _Block()
        elif found := event(bare):
            blocks[name].events.append((*found, bare))
    return blocks, "entry"
