"""Damages files that were valid: bytes, the values of JSON and TOML, tensors' headers, folders.

Everything is drawn from one ``random.Random``, so that a seed is an input.
"""

from __future__ import annotations

import copy
import json
import os
import string
import struct
import tomllib
from pathlib import Path
from random import Random
from typing import Any

# What a loader might take for code, for another file, or for a size that it then allocates.
STRINGS = (
    *("", "\0", "\ud800", "\ufeff", "x" * 5000, "\U0001f600", "é", "\x7f\x1b[2J", "a\nb"),
    *("../../secret.json", "../secret.json", "/etc/passwd", "/dev/zero", "file:///etc/passwd"),
    *("SECRET", "SECRETS/secret.safetensors", "manifest.json", "state.json", "."),
    *("planted", "planted:run", "planted.run", "os.system", "os:system", "builtins.eval"),
    *("aten.save.default", "aten.from_file.default", "prim.Print.default", "{{7*7}}", "%s%n"),
    *('File "SECRET", line 1, in f\n  x = 1', "SECRET:1 in f: x = 1", "/dev/zero:1 in f: x"),
    *("<script>alert(1)</script>", "__import__('planted')", "someone/kernel", "cuda:99", "meta"),
    *("nan", "inf", "1e999", "9" * 5000, "90%", "-1GiB", "999999999TiB", "int8", "torch.float32"),
    *("parameter", "gradient", "backward", "optimal", "pp", "dp", "F64", "I8", "float32", "auto"),
)
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 2**16, 2**24, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, 10**12),
    *(10**29, 10**30, 10**99, 10**101, -(2**63), -(10**40), 10**4200),
    *(0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, 1e25),
    *(float("inf"), float("-inf"), float("nan"), True, False),
)
KEYS = (
    *("", "params", "__class__", "__dict__", "__init__", "lr", "dtype", "torch_dtype", "step"),
    *("auto_map", "_attn_implementation", "attn_implementation", "quantization_config"),
    *("trust_remote_code", "experts_implementation", "_name_or_path", "per_layer_config"),
    *("num_hidden_layers", "hidden_size", "num_labels", "id2label", "vocab_size", "rope_scaling"),
    *("max_position_embeddings", "layer_types", "architectures", "model_type", "use_cache"),
    *("tie_word_embeddings", "pruned_heads", "text_config", "problem_type", "rope_parameters"),
    *("schema_version", "format", "tuple", "scalar", "node", "operator", "tensor", "float"),
)


def value(random: Random, depth: int = 0) -> Any:
    """Any JSON value; most are scalars that loaders dislike."""
    kind = random.random()
    if kind < 0.4:
        return random.choice(NUMBERS)
    if kind < 0.75:
        return random.choice(STRINGS)
    if kind < 0.8 or depth > 2:
        return None
    if kind < 0.82:
        return nested(random.choice((3, 20, 63, 66, 200)), random.random() < 0.5)
    items = [value(random, depth + 1) for _ in range(random.randrange(4))]
    return items if kind < 0.9 else {random.choice(KEYS): item for item in items}


def nested(depth: int, lists: bool) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner] if lists else {"a": inner}
    return inner


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside nested data."""
    found: list[tuple[Any, Any]] = []
    stack = [data]
    while stack:
        item = stack.pop()
        for key in item if isinstance(item, dict) else range(len(item)):
            found.append((item, key))
            if isinstance(item[key], (dict, list)):
                stack.append(item[key])
    return found


def changed_data(random: Random, data: Any) -> Any:
    """The same with one to four values replaced, lost, copied, swapped, retyped or renamed."""
    if random.random() < 0.02:
        return value(random)
    data = copy.deepcopy(data)
    for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
        known = places(data) if isinstance(data, (dict, list)) else []
        if not known:
            return value(random)
        _change(random, *random.choice(known), random.choice(known))
    return data


def _change(random: Random, holder: Any, key: Any, other: tuple[Any, Any]) -> None:
    found, (elsewhere, place) = holder[key], other
    if random.random() < 0.4 and type(found) in (int, float, str, bool):
        holder[key] = _of_the_same_kind(random, found)
        return
    match random.randrange(9):
        case 0 | 1:
            holder[key] = value(random)
        case 2:
            del holder[key]
        case 3:
            holder[key] = copy.deepcopy(elsewhere[place])
        case 4:
            first, second = copy.deepcopy(found), copy.deepcopy(elsewhere[place])
            elsewhere[place] = first
            holder[key] = second
        case 5:
            holder[key] = _retyped(random, found)
        case 6 if type(found) in (int, float):
            holder[key] = random.choice((found + 1, found - 1, -found, found * 2, found // 2))
        case 7 if isinstance(holder, dict):
            del holder[key]
            holder[random.choice((*KEYS, f"{key} ", key.upper(), key[:-1]))] = found
        case 8 if isinstance(holder, dict):
            holder[random.choice(KEYS)] = value(random)
        case _ if isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[: random.choice((1, 3, 50))]))
        case _:
            holder[key] = value(random)


def _of_the_same_kind(random: Random, found: Any) -> Any:
    if isinstance(found, str):
        return random.choice((found[::-1], found + "x", random.choice(STRINGS)))
    numbers = [number for number in NUMBERS if type(number) is type(found)]
    return random.choice(numbers)


def _retyped(random: Random, found: Any) -> Any:
    text = str(found) if not isinstance(found, (dict, list)) else "text"
    number = len(found) if isinstance(found, (str, dict, list)) else 1
    return random.choice((text, [found], {"a": found}, number, float(number), not found, None))


def changed_bytes(random: Random, content: bytes) -> bytes:
    """The same with some bytes flipped, lost, doubled, or in another encoding."""
    at = random.randrange(len(content) + 1)
    to = min(len(content), at + random.choice((1, 2, 8, 100, 1000)))
    match random.randrange(11):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + content[to:]
        case 2:
            return content[:to] + content[at:]
        case 3:
            return content[:at] + random.randbytes(random.choice((1, 4, 50))) + content[to:]
        case 4:
            return (
                content[:at] + random.choice(STRINGS).encode(errors="surrogatepass") + content[at:]
            )
        case 5:
            return content[:at] + random.choice((b"[", b"{", b'{"a":')) * 10**5 + content[at:]
        case 6:
            wide = content.decode(errors="replace").encode("utf-16")
            return random.choice(
                (b"\xef\xbb\xbf" + content, wide, content + b"\0", b"", b"\n" * 99)
            )
        case 7:
            marks = random.choices(string.punctuation.encode(), k=random.choice((1, 3, 9)))
            return content[:at] + bytes(marks) + content[at:]
        case 8:
            return content[:at] + b"a." * 30_000 + content[at:]
        case _:
            flipped = bytearray(content or b"x")
            for _ in range(random.choice((1, 1, 2, 8))):
                flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
            return bytes(flipped)


def changed_json(random: Random, content: bytes) -> bytes:
    data = changed_data(random, json.loads(content))
    text = json.dumps(data, ensure_ascii=random.random() < 0.9)
    if random.random() < 0.05 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every key twice
    return text.encode(errors="surrogatepass")


def changed_toml(random: Random, content: bytes) -> bytes:
    data = changed_data(random, tomllib.loads(content.decode()))
    if not isinstance(data, dict):
        return b"x = " + _toml(data).encode(errors="surrogatepass")
    lines = [f"{json.dumps(k)} = {_toml(v)}" for k, v in data.items() if not isinstance(v, dict)]
    for name, table in data.items():
        if isinstance(table, dict):
            lines += [f"[{json.dumps(name)}]"]
            lines += [f"{json.dumps(key)} = {_toml(item)}" for key, item in table.items()]
    return "\n".join(lines).encode(errors="surrogatepass")


def _toml(item: Any) -> str:
    if isinstance(item, dict):
        inner = ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in item.items())
        return f"{{ {inner} }}"
    if isinstance(item, list):
        return f"[{', '.join(map(_toml, item))}]"
    if item is None:
        return "1979-05-27T07:32:00Z"
    if isinstance(item, float):
        return repr(item)
    return hex(item) if type(item) is int and item > 10**99 else json.dumps(item)


def changed_tensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with a changed header, or what it says of offsets in its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.get("__metadata__", {})
    if "DCP_SHARDING_INFO" in metadata and random.random() < 0.6:
        changed = changed_json(random, metadata["DCP_SHARDING_INFO"].encode())
        metadata["DCP_SHARDING_INFO"] = changed.decode(errors="replace")
    else:
        header = changed_data(random, header)
    if random.random() < 0.2:
        rest = changed_bytes(random, rest) if random.random() < 0.5 else random.randbytes(len(rest))
    text = json.dumps(header).encode()
    length = (
        len(text) if random.random() < 0.97 else random.choice((0, 2**40, 2**63, len(text) + 1))
    )
    return struct.pack("<Q", length) + text + rest


_BY_SUFFIX = {
    ".json": changed_json,
    ".toml": changed_toml,
    ".safetensors": changed_tensors,
}


def changed_file(random: Random, name: str, content: bytes) -> bytes:
    """A file of a kind that its name tells, damaged; three in ten without a look at its kind."""
    structural = _BY_SUFFIX.get(Path(name).suffix)
    if structural is None or random.random() < 0.3:
        return changed_bytes(random, content)
    return structural(random, content)


def damage_folder(random: Random, folder: Path, secrets: Path) -> None:
    """One of its files becomes a link, a folder, a pipe, empty, endless, another, or is lost."""
    path = random.choice(sorted(folder.iterdir()))
    others = sorted(p for p in (*folder.iterdir(), *secrets.iterdir()) if p.is_file() and p != path)
    other = random.choice(others)
    match random.randrange(9):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.symlink_to(random.choice((other, Path("/dev/zero"), Path("loop"), path)))
        case 2:
            path.unlink()
            path.mkdir()
        case 3:
            path.unlink()
            os.mkfifo(path)
        case 4:
            os.truncate(path, random.choice((0, 2**20, 2**34, 2**40)))
        case 5:
            path.write_bytes(other.read_bytes())
        case 6:
            path.with_name(f"extra{path.suffix}").write_bytes(path.read_bytes())
        case 7:
            path.with_name(f"extra{path.suffix}").symlink_to(other)
        case _:
            path.rename(path.with_name(random.choice(("Manifest.json", "a b", "x" * 200))))
