"""Moments of an optimizer in 8 bits, with one scale for QUANTUM neighbours.

The first moment is a number of 127ths of the largest one.  Of the second the square root is kept,
as it is read: a number of 255ths and at least one, so that nothing is divided by a zero that was a
small number.  Both are rounded stochastically: with beta2 = 0.999 a
moment moves by less than a code in most steps, and rounding to nearest would never move it.

    codes [.., QUANTUM]  scale [..]     first = codes * scale     second = (codes * scale) ** 2
"""

import triton
import triton.language as tl


@triton.jit
def signed(codes, scale, QUANTUM: tl.constexpr):
    """First moments of int8 codes."""
    return _scaled(codes.to(tl.float32), scale, QUANTUM)


@triton.jit
def squared(codes, scale, QUANTUM: tl.constexpr):
    """Second moments of uint8 codes."""
    root = _scaled(codes.to(tl.float32), scale, QUANTUM)
    return root * root


@triton.jit
def signed_codes(x, random, QUANTUM: tl.constexpr):
    """int8 codes and float32 scales of first moments; ``random`` has 8 bits for each."""
    scale, inverse = _scale_of(tl.abs(x), 127.0, QUANTUM)
    codes = _rounded(_scaled(x, inverse, QUANTUM), random)
    return codes.to(tl.int8), scale


@triton.jit
def squared_codes(x, random, QUANTUM: tl.constexpr):
    """uint8 codes and float32 scales of second moments."""
    root = tl.sqrt(x)
    scale, inverse = _scale_of(root, 255.0, QUANTUM)
    codes = _rounded(_scaled(root, inverse, QUANTUM), random)
    return tl.maximum(codes, 1).to(tl.uint8), scale


@triton.jit
def _rounded(x, random):
    """256ths rounded up or down to whole numbers, as int32: the random bits carry or do not.

    Adding 1.5 * 2**23 leaves the nearest integer in the lower bits of a float.  The largest of a
    quantum becomes its code exactly, so no code is out of range.
    """
    bits = (x + 12582912.0).to(tl.int32, bitcast=True)
    return (bits - 0x4B400000 + random.to(tl.int32)) >> 8


@triton.jit
def _scaled(x, factors, QUANTUM: tl.constexpr):
    """Each QUANTUM elements times their factor."""
    rows: tl.constexpr = x.shape[0] // QUANTUM
    return tl.reshape(tl.reshape(x, [rows, QUANTUM]) * factors[:, None], [x.shape[0]])


@triton.jit
def _scale_of(x, largest_code: tl.constexpr, QUANTUM: tl.constexpr):
    """Of each QUANTUM elements: the largest divided by its code, and 256 times the inverse."""
    rows: tl.constexpr = x.shape[0] // QUANTUM
    largest = tl.max(tl.reshape(x, [rows, QUANTUM]), 1)
    divisor = tl.where(largest > 0.0, largest, 1.0)
    return largest / largest_code, (256.0 * largest_code) / divisor
