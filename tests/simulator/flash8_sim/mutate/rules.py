"""Statement by statement: how it is deleted, and how it is made weaker.

A rule yields (kind, text). The text takes the place of the statement; it may be empty. Where a
change is known to be the same program, or one that every driver refuses, it is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .statements import Statement

Changes = Iterator[tuple[str, str]]

_NARROWER = {"cluster": "cta", "gpu": "cta", "sys": "cta"}
_WARP = 32  # threads that a barrier's count misses, or waits for in vain
_TRANSACTION = 16  # bytes: the smallest bulk copy
_DELAY = 100  # turns of a loop, between the load and the store of what was one atomic
_TEMPORARY = "mutant_value"
_OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "inc")


def changes(statement: Statement) -> Changes:
    """Every (kind, text) of one statement; none if it does not synchronize."""
    for prefixes, rule in _RULES:
        if statement.starts(*prefixes):
            yield from rule(statement)
            return


def _deleted(s: Statement) -> Changes:
    yield "deleted", ""


def _without(s: Statement, word: str) -> str:
    return ".".join(w for w in s.words if w != word)


def _with_word(s: Statement, old: str, new: str) -> str:
    return ".".join(new if w == old else w for w in s.words)


def _added(s: Statement, at: int, delta: int) -> str:
    """The statement with `delta` more in an operand, which is a number or a register."""
    value = s.operands[at]
    try:
        number, before = str(int(value, 0) + delta), ""
    except ValueError:
        number, before = _TEMPORARY, f"add.s32 {_TEMPORARY}, {value}, {delta};"
    return _in_scope(before, s.text(operands=(*s.operands[:at], number, *s.operands[at + 1 :])))


def _in_scope(before: str, text: str, kind: str = "b32") -> str:
    return f"{{ .reg .{kind} {_TEMPORARY}; {before} {text} }}" if before else text


def _weaker_scope(s: Statement) -> Changes:
    for scope, narrower in _NARROWER.items():
        if scope in s.words:
            yield f"{scope} to {narrower}", s.text(opcode=_with_word(s, scope, narrower))


def _weaker_order(s: Statement) -> Changes:
    for order in ("acq_rel", "acquire", "release"):
        if order in s.words:
            yield f"{order} to relaxed", s.text(opcode=_with_word(s, order, "relaxed"))


# ------------------------------------------------------------------------------- mbarriers


def _wait(s: Statement) -> Changes:
    yield "deleted", s.text(opcode="mov.pred", operands=(s.operands[0], "-1"))
    if "parity" in s.words:
        value = s.operands[2]
        if value in ("0", "1"):
            other, before = str(1 - int(value)), ""
        else:
            other, before = _TEMPORARY, f"xor.b32 {_TEMPORARY}, {value}, 1;"
        operands = (*s.operands[:2], other, *s.operands[3:])
        yield "parity", _in_scope(before, s.text(operands=operands))
    yield from _relaxed(s, "acquire", 3 if "parity" in s.words else 2)
    yield from _weaker_scope(s)


def _relaxed(s: Statement, order: str, at: int) -> Changes:
    """Relaxed order; what is not said is `order` at the scope of the CTA."""
    if order in s.words:
        yield "relaxed", s.text(opcode=_with_word(s, order, "relaxed"))
    elif "relaxed" not in s.words:
        words = (*s.words[:at], "relaxed", "cta", *s.words[at:])
        yield "relaxed", s.text(opcode=".".join(words))


def _arrive(s: Statement) -> Changes:
    yield from _deleted(s)
    has_state = not s.operands[0].startswith("[")
    count_at = 2 if has_state else 1
    if "expect_tx" in s.words:
        yield from _bytes(s)
        yield from _relaxed(s, "release", 3)
    else:
        if len(s.operands) > count_at:
            yield "count + 1", _added(s, count_at, 1)
        else:
            yield "count + 1", s.text(operands=(*s.operands, "2"))
        yield from _relaxed(s, "release", 2)
    yield from _weaker_scope(s)


def _bytes(s: Statement) -> Changes:
    for delta in (_TRANSACTION, -_TRANSACTION):
        yield f"bytes {delta:+}", _added(s, len(s.operands) - 1, delta)


def _expect(s: Statement) -> Changes:
    yield from _deleted(s)
    yield from _bytes(s)


def _init(s: Statement) -> Changes:
    yield from _deleted(s)
    yield "count + 1", _added(s, 1, 1)
    if s.operands[1] != "1":
        yield "count - 1", _added(s, 1, -1)


def _own_cta(s: Statement) -> Changes:
    """The address in the other CTA becomes that in the own."""
    yield "own CTA", s.text(opcode=f"mov.{s.words[-1]}", operands=s.operands[:2])


# ------------------------------------------------------------------------------- groups


def _wait_group(s: Statement) -> Changes:
    yield from _deleted(s)
    if s.operands:
        yield "one more pending", s.text(operands=(str(int(s.operands[0], 0) + 1),))
    if s.starts("cp.async.bulk.wait_group") and "read" not in s.words:
        yield "reads only", s.text(opcode=f"{s.opcode}.read")


# ------------------------------------------------------------------------------- barriers


def number_of_barrier(s: Statement) -> str:
    """Which of the CTA's barriers a statement means: a number or a register; empty for others."""
    is_named = s.starts("bar", "barrier") and not {"warp", "cluster"} & set(s.words)
    return s.operands[1 if "red" in s.words else 0] if is_named else ""


def _named_barrier(s: Statement) -> Changes:
    arrives, reduces = "arrive" in s.words, "red" in s.words
    number_at = 1 if reduces else 0
    has_count = len(s.operands) == (4 if reduces else 2)
    if not reduces:
        yield from _deleted(s)
    elif "popc" not in s.words:
        yield "deleted", s.text(opcode="mov.pred", operands=(s.operands[0], s.operands[-1]))
    if s.operands[number_at].isdigit():
        other = str((int(s.operands[number_at]) + 1) % 16)
        listed = (*s.operands[:number_at], other, *s.operands[number_at + 1 :])
        yield "another barrier", s.text(operands=listed)
    else:
        yield "another barrier", _added(s, number_at, 1)
    if has_count:
        for delta in (_WARP, -_WARP):
            yield f"count {delta:+}", _added(s, number_at + 1, delta)
        if not arrives and not reduces:
            yield "arrive only", s.text(opcode=_with_word(s, "sync", "arrive"))


def _cluster_barrier(s: Statement) -> Changes:
    yield from _deleted(s)
    if "arrive" in s.words and "relaxed" not in s.words:
        if "release" in s.words:
            yield "relaxed", s.text(opcode=_with_word(s, "release", "relaxed"))
        else:
            words = (*s.words[:3], "relaxed", *s.words[3:])
            yield "relaxed", s.text(opcode=".".join(words))


# ------------------------------------------------------------------------------- fences and memory


def _fence(s: Statement) -> Changes:
    yield from _deleted(s)
    if s.opcode == "fence.proxy.async":
        for space in ("shared::cta", "global"):
            yield f"{space} only", s.text(opcode=f"{s.opcode}.{space}")
    if s.starts("membar.gl", "membar.sys"):
        yield f"{s.words[1]} to cta", s.text(opcode="membar.cta")
    if "mbarrier_init" not in s.words:
        yield from _weaker_scope(s)


def _access(s: Statement) -> Changes:
    """Strong loads and stores: weaker in order, in scope, and at last weak."""
    if any(space in s.words for space in ("param", "const", "local")):
        return
    yield from _weaker_order(s)
    yield from _weaker_scope(s)
    if "relaxed" in s.words:
        words = (w for w in s.words if w not in ("relaxed", *_NARROWER, "cta"))
        yield "weak", s.text(opcode=".".join(words))
    if "volatile" in s.words:
        yield "weak", s.text(opcode=_without(s, "volatile"))


def _atomic(s: Statement) -> Changes:
    returns = s.starts("atom")
    yield from _weaker_order(s)
    yield from _weaker_scope(s)
    ordered = [w for w in s.words if w in ("relaxed", "acquire", "release", "acq_rel")]
    if not ordered and not set(_NARROWER) & set(s.words) and "cta" not in s.words:
        words = (s.words[0], "relaxed", "cta", *s.words[1:])
        yield "gpu to cta", s.text(opcode=".".join(words))
    if not returns:
        yield from _deleted(s)
    yield from _not_atomic(s)


def _not_atomic(s: Statement) -> Changes:
    """A strong load, the operation and a strong store, with time for others in between."""
    returns, kind = s.starts("atom"), s.words[-1]
    space = next((w for w in s.words if w.startswith(("global", "shared"))), "")
    way = next((w for w in s.words if w in _OPERATIONS), "")
    if s.guard or not way or {"v2", "v4", "v8", "noftz"} & set(s.words) or "x2" in kind:
        return
    old = s.operands[0] if returns else _TEMPORARY
    address, value = s.operands[1:3] if returns else s.operands[:2]
    memory = ".relaxed.gpu" + (f".{space}" if space else "")
    lines = [
        f"ld{memory}.{kind} {old}, {address};",
        f".reg .pred {_TEMPORARY}_more; .reg .u32 {_TEMPORARY}_turn;",
        f"mov.u32 {_TEMPORARY}_turn, {_DELAY};",
        f"{_TEMPORARY}_delay: sub.u32 {_TEMPORARY}_turn, {_TEMPORARY}_turn, 1;",
        f"setp.ne.u32 {_TEMPORARY}_more, {_TEMPORARY}_turn, 0;",
        f"@{_TEMPORARY}_more bra {_TEMPORARY}_delay;",
    ]
    if way == "inc":
        lines += [
            f".reg .pred {_TEMPORARY}_wraps;",
            f"setp.ge.u32 {_TEMPORARY}_wraps, {old}, {value};",
            f"add.u32 {_TEMPORARY}_new, {old}, 1;",
            f"selp.u32 {_TEMPORARY}_new, 0, {_TEMPORARY}_new, {_TEMPORARY}_wraps;",
        ]
    elif way == "exch":
        lines.append(f"mov.{kind} {_TEMPORARY}_new, {value};")
    else:
        bits = f"b{kind[1:]}" if way in ("and", "or", "xor") else kind
        lines.append(f"{way}.{bits} {_TEMPORARY}_new, {old}, {value};")
    lines.append(f"st{memory}.{kind} {address}, {_TEMPORARY}_new;")
    registers = f".reg .{kind} {_TEMPORARY}, {_TEMPORARY}_new;"
    yield "not atomic", "{ " + " ".join([registers, *lines]) + " }"


# ------------------------------------------------------------------------------- the rest


def _registers(s: Statement) -> Changes:
    yield from _deleted(s)
    yield "registers + 8", s.text(operands=(str(int(s.operands[0], 0) + 8),))


def _elect(s: Statement) -> Changes:
    """Everyone is elected."""
    yield (
        "everyone",
        s.text(opcode="mov.pred", operands=(s.operands[0].split("|")[-1].strip(), "-1")),
    )


_RULES: tuple[tuple[tuple[str, ...], Callable[[Statement], Changes]], ...] = (
    (("mbarrier.try_wait", "mbarrier.test_wait"), _wait),
    (("mbarrier.arrive", "mbarrier.arrive_drop"), _arrive),
    (("mbarrier.expect_tx", "mbarrier.complete_tx"), _expect),
    (("mbarrier.init",), _init),
    (("mbarrier.inval",), _deleted),
    (("mapa",), _own_cta),
    (("wgmma.wait_group", "cp.async.wait_group", "cp.async.bulk.wait_group"), _wait_group),
    (("cp.async.wait_all", "cp.async.mbarrier.arrive"), _deleted),
    (("wgmma.commit_group", "cp.async.commit_group", "cp.async.bulk.commit_group"), _deleted),
    (("wgmma.fence",), _deleted),
    (("fence", "membar"), _fence),
    (("bar.warp", "barrier.warp"), _deleted),
    (("barrier.cluster",), _cluster_barrier),
    (("bar", "barrier"), _named_barrier),
    (("ld", "st"), _access),
    (("red", "atom"), _atomic),
    (("setmaxnreg",), _registers),
    (("griddepcontrol",), _deleted),
    (("elect",), _elect),
)
