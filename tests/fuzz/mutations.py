"""Damage to files: of their bytes, and of what they are made of, so that it gets past the parser.

All take a ``random.Random``: hypothesis has one that it controls, and atheris gives a seed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from random import Random
from typing import Any

# What programmers do not think of: as 64-bit little-endian, as JSON and as TOML.
EDGES = [0, 1, 2, 7, 8, 31, 32, 255, (1 << 64) - 1]
EDGES += [sign << bit for bit in (15, 31, 32, 40, 62, 63) for sign in (1, -1)]
DIGITS, TOO_MANY_DIGITS = "9" * 400, "9" * 5000
NUMBERS = ["-1", "0", "1", "1.5", "-0.0", "1e400", "1000000000000", DIGITS, TOO_MANY_DIGITS]
TEXTS = ['""', '"x"', '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '"../x"', '"/x"', '"C:\\\\x"', f'"{"x" * 300}"']
NESTED = ["[]", "[[]]", '["x"]', "{}", "[" * 40 + "]" * 40, "[" * 20_000]
ODD_JSON = [*NUMBERS, *TEXTS, *NESTED, "null", "true", "NaN", "-Infinity", '{"x": 1}', '{"x": 1, "x": 2}', "[null]"]
ODD_TOML = [*NUMBERS, *TEXTS, *NESTED, "true", "nan", "-inf", "2020-01-01", "25:00:00", "{x = 1}", "{a=" * 5000, "'''"]
TOML_LINES = ["", "x = 1", "[options]", "[conversion]", "[x.x]", "[[options]]", "min_top1 = 2", "a." * 400 + "a = 1"]


def mutate(kind: str, data: bytes, rng: Random) -> bytes:
    """Damage a file of that kind."""
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    try:
        match kind:
            case "gguf" | "gguf-model":
                return mutate_bytes(data, rng)
            case "safetensors":
                return mutate_header(data, rng)
            case "target":
                return mutate_toml(data, rng)
        return mutate_json(data, rng)
    except (ValueError, RecursionError, struct.error):  # it has been damaged before
        return mutate_bytes(data, rng)


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Flip, cut, splice, and put edge values where lengths and counts may be."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randint(0, len(changed)), rng.randint(1, 64)
        match rng.choice(["flip", "edge", "edge", "cut", "drop", "splice"]):
            case "flip":
                changed[at : at + 1] = bytes([rng.randrange(256)])
            case "edge":
                width = rng.choice([1, 4, 8])
                changed[at : at + width] = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
            case "cut":
                del changed[at:]
            case "drop":
                del changed[at : at + length]
            case "splice":
                start = rng.randint(0, len(changed))
                changed[at:at] = changed[start : start + length]
    return bytes(changed)


def mutate_json(text: bytes, rng: Random) -> bytes:
    """Put odd values in place of others, leave some out, and have some twice.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    data = json.loads(text)
    marks: dict[str, str] = {}
    for number in range(rng.randint(1, 3)):
        places = list(_places(data))
        if not places:
            break
        (parent, key), mark = rng.choice(places), f"@{number}@"
        match rng.choice(["odd", "odd", "odd", "absent", "twice"]):
            case "odd":
                parent[key] = mark
                marks[json.dumps(mark)] = rng.choice(ODD_JSON)
            case "absent":
                del parent[key]
            case "twice" if isinstance(parent, list):
                parent.append(parent[key])
            case "twice":
                parent[mark] = parent[key]
                marks[json.dumps(mark)] = json.dumps(key)
    changed = json.dumps(data)
    for mark, odd in marks.items():
        changed = changed.replace(mark, odd)
    return changed.encode()


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = range(len(data)) if isinstance(data, list) else data if isinstance(data, dict) else ()
    for key in list(keys):
        yield data, key
        yield from _places(data[key])


def mutate_header(data: bytes, rng: Random) -> bytes:
    """Damage the JSON header of a safetensors file; its length is put right, or is an edge value.

    Raises:
        ValueError, RecursionError, struct.error: it has no such header.
    """
    (length,) = struct.unpack_from("<Q", data)
    header = mutate_json(data[8 : 8 + length], rng)
    announced = rng.choice(EDGES) if rng.random() < 0.1 else len(header)
    return struct.pack("<Q", announced % (1 << 64)) + header + data[8 + length :]


def mutate_toml(text: bytes, rng: Random) -> bytes:
    """Put odd values in place of others, and lines and tables where they do not belong.

    Raises:
        ValueError: it is not UTF-8.
    """
    lines = text.decode().splitlines() or [""]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        name = lines[at].partition("=")[0]
        odd = f"{name} = {rng.choice(ODD_TOML)}" if rng.random() < 0.7 else rng.choice(TOML_LINES)
        lines[at : at + rng.randint(0, 1)] = [odd]
    return "\n".join(lines).encode()
