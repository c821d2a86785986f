"""Moments of an optimizer in 8 bits, with one scale for QUANTUM neighbours.

The first moment is a number of 127ths of the largest one.  Of the second the square root is kept,
as it is read: a number of 255ths, at least one where the moment is not zero, so that nothing is
divided by a zero that was a small number.  Both are rounded stochastically: with beta2 = 0.999 a
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
    codes = tl.floor(_scaled(x, inverse, QUANTUM) + _fraction(random))
    return tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), scale


@triton.jit
def squared_codes(x, random, QUANTUM: tl.constexpr):
    """uint8 codes and float32 scales of second moments."""
    root = tl.sqrt(x)
    scale, inverse = _scale_of(root, 255.0, QUANTUM)
    codes = tl.floor(_scaled(root, inverse, QUANTUM) + _fraction(random))
    smallest = tl.where(x > 0.0, 1.0, 0.0)
    return tl.minimum(tl.maximum(codes, smallest), 255.0).to(tl.uint8), scale


@triton.jit
def _fraction(random):
    """8 random bits as a float32 between 0 and 1."""
    return random.to(tl.int32).to(tl.float32) * 0.00390625 + 0.001953125


@triton.jit
def _scaled(x, factors, QUANTUM: tl.constexpr):
    """Each QUANTUM elements times their factor."""
    rows: tl.constexpr = x.shape[0] // QUANTUM
    return tl.reshape(tl.reshape(x, [rows, QUANTUM]) * factors[:, None], [x.shape[0]])


@triton.jit
def _scale_of(x, largest_code, QUANTUM: tl.constexpr):
    """Of each QUANTUM elements: the largest divided by its code, and the inverse or zero."""
    rows: tl.constexpr = x.shape[0] // QUANTUM
    largest = tl.max(tl.reshape(x, [rows, QUANTUM]), 1)
    inverse = tl.where(largest > 0.0, largest_code / largest, 0.0)
    return largest / largest_code, inverse
