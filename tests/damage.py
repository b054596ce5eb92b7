"""Files as a bad disk, or a person with an editor, leaves them."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

VALUES = (None, -1, 10**400, 1e308, "", "x" * 70_000, "\x00", [], {}, [None], {"event": 1}, True)


def trying(count):
    """Settings of hypothesis for `count` examples, the same ones each time."""
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


INSERTED = (b"PK\5\6", b"PK\1\2", b"PK\3\4", b"\0\0\0\0", b"\xff" * 4, b"[" * 5000)


@st.composite
def mutated(draw, data):
    """Bytes of which some were changed, lost, doubled or moved."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, count = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(1, 30))
        deed = draw(st.sampled_from(["set", "cut", "double", "end", "insert"]))
        if deed == "set":
            data[at : at + count] = draw(st.binary(min_size=1, max_size=8))
        elif deed == "cut":
            del data[at : at + count]
        elif deed == "double":
            data[at:at] = data[at : at + count]
        elif deed == "end":
            del data[at:]
        else:
            data[at:at] = draw(st.sampled_from(INSERTED))
    return bytes(data)


@st.composite
def mutated_lines(draw, data):
    """JSON, one value to a line, in which a value or a key was replaced, or which was mutated byte by byte."""
    if draw(st.booleans()):
        return draw(mutated(data))
    lines = [json.loads(line) for line in data.splitlines()]
    number = draw(st.integers(0, len(lines) - 1))
    path = draw(st.sampled_from(list(paths(lines[number]))))
    value = draw(st.sampled_from(VALUES))
    if not path:
        lines[number] = value
    else:
        *parents, last = path
        parent = lines[number]
        for key in parents:
            parent = parent[key]
        if draw(st.booleans()):
            parent[last] = value
        else:
            del parent[last]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def paths(tree, depth=3):
    """The keys and indices that lead to each value, down to `depth`."""
    yield ()
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in children if depth else ():
        yield from ((key, *rest) for rest in paths(child, depth - 1))
