"""Numbers in 8 or 4 bits with one scale for QUANTUM neighbours, and back: what ranks send.

    x       [.., QUANTUM]   float32 or bfloat16
    scale   [..]            the largest |x| of a block over the largest code, float32
    codes   [.., QUANTUM]   x / scale as an int8 (to 127) or the bits of an e4m3 float (to 448)
            [.., half]      or as int4 (to 7): a byte has element j, and j + half in its upper bits

A block that has a NaN or an infinity gets NaN for a scale, and codes that mean nothing: it comes
back as NaN.  A scale is at least 2**-122, so that its inverse is finite and a block of zeros needs
no case of its own.  Rounding is to nearest, ties to even, or right on average: then bits are drawn
for each element by its index in the whole model (``numerics.random_bits``), however that is cut.

``eager_quantize`` has the same functions in torch operators, equal to the bit but for the order in
which squares are added.  All buffers are flat and contiguous, and begin at a multiple of 4 bytes
(of 16, to be read and written at full speed).  The length of floats is a multiple of QUANTUM, a
power of two from 32 to 2048: callers pad them with zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxzero.kernels import numerics
from fxzero.kernels.eager_quantize import SQUARES_BLOCK, pieces_of

BLOCK = 8192
SMALL_BLOCK = SQUARES_BLOCK  # where registers hold several pieces, or random bits
WARPS = 4

_UNROLLED: tl.constexpr = tl.constexpr(8)  # pieces that are read at a time
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(0x02800000)
_INVERSE_7: tl.constexpr = tl.constexpr(1 / 7)
_INVERSE_127: tl.constexpr = tl.constexpr(1 / 127)
_INVERSE_448: tl.constexpr = tl.constexpr(1 / 448)
_FLOAT8_SCALE: tl.constexpr = tl.constexpr(2.0**-120)
_FLOAT8_INVERSE: tl.constexpr = tl.constexpr(2.0**120)


def quantize(
    x: Tensor, codes: Tensor, scales: Tensor, kind: str, key: Tensor | None = None
) -> None:
    """Writes codes and scales of ``x``.

    Args:
        x: float32 or bfloat16; QUANTUM is its length over that of ``scales``.
        codes: int8 for "int8", uint8 for "fp8", uint8 of half the length for "int4".
        key: int64 [3], for stochastic rounding: seed, step, and the index of the first element in
            the whole model, a multiple of 8.
    """
    elements = x.numel()
    block = BLOCK if key is None else SMALL_BLOCK
    with torch.cuda.device_of(x):
        quantize_kernel[(triton.cdiv(elements, block),)](
            x, codes, scales, scales if key is None else key, elements,
            kind, key is not None, elements // scales.numel(), block,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def dequantize(codes: Tensor, scales: Tensor, out: Tensor, kind: str) -> None:
    """Writes what ``quantize`` had, as far as it is known, into ``out``: float32 or bfloat16."""
    dequantize_reduce(codes, scales, out, kind)


def dequantize_reduce(
    codes: Tensor,
    scales: Tensor,
    out: Tensor,
    kind: str,
    squares: Tensor | None = None,
) -> None:
    """Writes the mean of pieces, which lie one behind the other.

    They are added in their order, as float32, and the sum is multiplied by 1 / pieces as float32.

    Args:
        codes, scales: of all pieces, each as long as ``out``.
        squares: float32, one for each SQUARES_BLOCK of ``out``: the sum of its squares, before it
            is rounded to bfloat16.
    """
    assert codes.data_ptr() % 4 == 0, "int4 are read in words"
    elements = out.numel()
    pieces = pieces_of(codes, out, kind)
    block = BLOCK if pieces == 1 and squares is None else SMALL_BLOCK
    with torch.cuda.device_of(out):
        dequantize_kernel[(triton.cdiv(elements, block),)](
            codes, scales, out, out if squares is None else squares, elements,
            kind, pieces, squares is not None, elements * pieces // scales.numel(), block,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def quantize_kernel(
    x,
    codes,
    scales,
    key,
    elements,
    KIND: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    QUANTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a BLOCK.  Its mask is of whole rows and leaves accesses as wide as they are."""
    rows: tl.constexpr = BLOCK // QUANTUM
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, rows)
    some = row < (elements - start) // QUANTUM
    mask = some[:, None]
    if STOCHASTIC:
        seed, step, index = tl.load(key), tl.load(key + 1).to(tl.int32), tl.load(key + 2)
        random = numerics.random_bits(seed, step, index + start, BLOCK)
        random = tl.reshape(random, [rows, QUANTUM])
    if KIND == "int4":
        half: tl.constexpr = QUANTUM // 2
        column = tl.arange(0, half)[None, :]
        place = row[:, None] * QUANTUM + column
        low = numerics.to_float32(tl.load(x + start + place, mask))
        high = numerics.to_float32(tl.load(x + start + half + place, mask))
        largest = tl.maximum(_largest(low), _largest(high))
        scale, inverse = _scale(largest, _INVERSE_7)
        low, high = low * inverse[:, None], high * inverse[:, None]
        if STOCHASTIC:
            halves = tl.permute(tl.reshape(random, [rows, 2, half]), (0, 2, 1))
            low_bits, high_bits = tl.split(halves)
            low, high = low + _dither(low_bits), high + _dither(high_bits)
            low, high = _clamp(low, 7.0), _clamp(high, 7.0)
        packed = (_integer(low) & 0xF) | (_integer(high) << 4)
        tl.store(codes + start // 2 + row[:, None] * half + column, packed.to(tl.uint8), mask)
    else:
        place = row[:, None] * QUANTUM + tl.arange(0, QUANTUM)[None, :]
        values = numerics.to_float32(tl.load(x + start + place, mask))
        inverse_code: tl.constexpr = _INVERSE_127 if KIND == "int8" else _INVERSE_448
        scale, inverse = _scale(_largest(values), inverse_code)
        values = values * inverse[:, None]
        if KIND == "int8":
            if STOCHASTIC:
                values = _clamp(values + _dither(random), 127.0)
            found = _integer(values).to(tl.int8)
        else:
            found = _float8(values, random if STOCHASTIC else None)
        tl.store(codes + start + place, found, mask)
    tl.store(scales + start // QUANTUM + row, scale, some)


@triton.jit
def _largest(x):
    """Bits of the largest |x| of each row: as integers, where a NaN is above infinity."""
    return tl.max((numerics.bits_of(x) & 0x7FFFFFFF).to(tl.int32), 1)


@triton.jit
def _scale(largest, INVERSE_CODE: tl.constexpr):
    """Scale and its inverse for the bits of the largest of each row."""
    scale = largest.to(tl.float32, bitcast=True) * INVERSE_CODE
    bits = tl.maximum(scale.to(tl.int32, bitcast=True), _SMALLEST_SCALE)
    bits = tl.where(largest >= _INFINITY, _NAN, bits)
    scale = bits.to(tl.float32, bitcast=True)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _clamp(x, CODE: tl.constexpr):
    return tl.minimum(tl.maximum(x, -CODE), CODE)


@triton.jit
def _integer(x):
    """The nearest integer, ties to even, in the lower bits of a uint32, whose upper are others."""
    return numerics.bits_of(x + 12582912.0)


@triton.jit
def _dither(random):
    """16 random bits as a float between -1/2 and 1/2: rounded with it, x is right on average."""
    return random.to(tl.int32).to(tl.float32) * 0.0000152587890625 - 0.49999237060546875


@triton.jit
def _float8(x, random):
    """Bits of e4m3 of floats within its range.

    Times 2**-120 the exponents of float32 are those of e4m3, for subnormal numbers, too.
    """
    bits = numerics.bits_of(x * _FLOAT8_SCALE)
    if random is None:
        carried = bits + 0x7FFFF + ((bits >> 20) & 1)
    else:
        carried = bits + (random << 4)
    return (((carried << 4) | (carried & 0x80000000)) >> 24).to(tl.uint8)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    out,
    squares,
    elements,
    KIND: tl.constexpr,
    PIECES: tl.constexpr,
    SQUARES: tl.constexpr,
    QUANTUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a BLOCK of ``out``."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    row = tl.arange(0, BLOCK // QUANTUM)
    some = row < (elements - start) // QUANTUM
    column = tl.arange(0, QUANTUM // 2 if KIND == "int4" else QUANTUM)[None, :]
    scales += start // QUANTUM + row
    if KIND == "int4":  # words of 8 codes
        word = row[:, None] * (QUANTUM // 8) + tl.arange(0, QUANTUM // 8)[None, :]
        codes = codes.to(tl.pointer_type(tl.uint32), bitcast=True) + start // 8 + word
    else:
        codes += start + row[:, None] * QUANTUM + column
    low, high = _piece(codes, scales, 0, elements, some, KIND, QUANTUM)
    if PIECES <= _UNROLLED:
        for piece in tl.static_range(1, PIECES):
            more, upper = _piece(codes, scales, piece, elements, some, KIND, QUANTUM)
            low, high = low + more, high + upper
    else:
        for piece in range(1, PIECES):
            more, upper = _piece(codes, scales, piece, elements, some, KIND, QUANTUM)
            low, high = low + more, high + upper
    if PIECES > 1:
        low, high = low * (1.0 / PIECES), high * (1.0 / PIECES)
    mask = some[:, None]
    out += start + row[:, None] * QUANTUM + column
    _store(out, low, mask)
    each = low * low
    if KIND == "int4":
        _store(out + QUANTUM // 2, high, mask)
        each += high * high
    if SQUARES:
        tl.store(squares + start // BLOCK, tl.sum(tl.sum(each, 1), 0))


@triton.jit
def _piece(codes, scales, piece, elements, some, KIND: tl.constexpr, QUANTUM: tl.constexpr):
    """Floats of a block of one piece, zeros but for ``some`` rows; of int4 the halves of rows."""
    blocks = elements // QUANTUM * piece
    scale = tl.load(scales + blocks, some, 0.0)[:, None]  # any code times zero is zero
    width: tl.constexpr = QUANTUM // 8 if KIND == "int4" else QUANTUM
    found = tl.load(codes + tl.multiple_of(blocks * width, width), some[:, None])
    if KIND == "int4":
        scale *= 0.0625
        low, high = _upper_halves(found << 4) * scale, _upper_halves(found) * scale
    else:
        low = _decoded(found, KIND) * scale
        high = low
    return low, high


@triton.jit
def _decoded(codes, KIND: tl.constexpr):
    """Codes of one byte as float32."""
    if KIND == "int8":
        x = codes.to(tl.float32)
    else:
        # The sign is extended over bits of exponent that e4m3 does not have; one of these is kept.
        bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
        x = bits.to(tl.float32, bitcast=True) * _FLOAT8_INVERSE
    return x


@triton.jit
def _upper_halves(words):
    """The upper 4 bits of each of 4 bytes, a signed number, times 16, as float32."""
    upper = words & 0xF0F0F0F0
    even = tl.join(_float_of_byte(upper), _float_of_byte(upper >> 16))
    odd = tl.join(_float_of_byte(upper >> 8), _float_of_byte(upper >> 24))
    return tl.reshape(tl.join(even, odd), [words.shape[0], 4 * words.shape[1]])


@triton.jit
def _float_of_byte(words):
    return words.to(tl.int8).to(tl.float32)


@triton.jit
def _store(pointers, x, mask):
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, _nearest_bfloat16(x), mask)
    else:
        tl.store(pointers, x, mask)


@triton.jit
def _nearest_bfloat16(x):
    """What arithmetic has made, rounded to nearest, ties to even.

    A NaN of a device's arithmetic is 0x7FFFFFFF, that of a scale 0x7FC00000.  So the first is made
    the second, which no carry makes a number: less to do than for the bits of any NaN.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True), _NAN).to(tl.uint32, bitcast=True)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)
