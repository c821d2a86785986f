"""Rounding, splitting and random bits for kernels, in integer arithmetic on the bits of floats.

Integers give the same result on a device and in Triton's interpreter, whose own casts to bfloat16
truncate and whose casts to float8 are wrong for one value in thirty.  ``eager_numerics`` has the
same functions for tensors, equal to the bit.

    float32 master      s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
    high, bfloat16      s eeeeeeee mmmmmmm                       what the model sees
    low, int16                             mmmmmmmmmmmmmmmm      what bfloat16 has lost, signed

High is the master rounded to nearest, so low is what to add, between -2**15 and 2**15 - 1; both
together are the master, bit for bit.  With 8 bits of low the master has 16 bits of mantissa.

Random bits are Philox4x32 of an element's index in the whole model, so that no result depends on
how the model is cut into shards.  Seven rounds are the fewest that pass BigCrush (Salmon et al.,
SC 2011, table 2).
"""

import triton
import triton.language as tl

_NAN: tl.constexpr = tl.constexpr(0x7FC0)  # of bfloat16
_ROUNDS: tl.constexpr = tl.constexpr(7)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def to_float32(x):
    """A float of 16 or 32 bits as float32, exactly: subnormal bfloat16 in the interpreter, too."""
    if x.dtype == tl.bfloat16:
        upper = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        x = upper.to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def bits_of(x):
    """The bits of a float32 as uint32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _bfloat16_of(upper):
    """The bfloat16 with the bits in the lower half of a uint32."""
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _or_nan(upper, x):
    """``upper``, or a NaN where ``x`` is one: a carry may have made it a number."""
    return tl.where(x != x, _NAN, upper)


@triton.jit
def nearest_bfloat16(x):
    """A float32 rounded to the nearest bfloat16, ties to even."""
    bits = bits_of(x)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return _bfloat16_of(_or_nan(upper, x))


@triton.jit
def store_nearest(pointers, x, mask):
    """Stores a float32 as what pointers point to; as bfloat16 rounded to nearest, ties to even."""
    if pointers.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, nearest_bfloat16(x), mask)
    else:
        tl.store(pointers, x, mask)


@triton.jit
def stochastic_bfloat16(x, random):
    """A float32 rounded up or down with probabilities that make it right on average.

    Args:
        random: 16 random bits for each element, as uint32.
    """
    bits = bits_of(x)
    return _bfloat16_of(_or_nan((bits + random) >> 16, x))


@triton.jit
def split(x, LOW_BITS: tl.constexpr):
    """A float32 as a bfloat16 and an int16 (LOW_BITS = 16) or an int8 (8) of what that has lost."""
    bits = bits_of(x)
    rounded = bits if LOW_BITS == 16 else (bits + 0x80) & 0xFFFFFF00
    upper = _or_nan((rounded + 0x8000) >> 16, x)
    low = rounded.to(tl.int32, bitcast=True).to(tl.int16)
    if LOW_BITS == 8:
        low = (low >> 8).to(tl.int8)
    return _bfloat16_of(upper), low


@triton.jit
def join(high, low, LOW_BITS: tl.constexpr):
    """The float32 that ``split`` had, rounded to 16 bits of mantissa where LOW_BITS is 8."""
    upper = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    signed = low.to(tl.int32)
    if LOW_BITS == 8:
        signed = signed << 8
    return (upper + signed.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def random_bits(seed, step, first, BLOCK: tl.constexpr):
    """16 random bits for each of BLOCK elements, as uint32.

    Eight neighbours share one call of the generator: a thread with eight elements makes one.

    Args:
        seed: int64 scalar.
        step: int32 scalar: the bits are others in each.
        first: int64 scalar, a multiple of 8: index of the first element.
    """
    counter = first // 8 + tl.arange(0, BLOCK // 8)
    a, b, c, d = _philox(seed, step, counter)
    lower = tl.join(tl.join(a & 0xFFFF, c & 0xFFFF), tl.join(b & 0xFFFF, d & 0xFFFF))
    upper = tl.join(tl.join(a >> 16, c >> 16), tl.join(b >> 16, d >> 16))
    return tl.reshape(tl.join(lower, upper), [BLOCK])


@triton.jit
def random_bits_anywhere(seed, step, first, BLOCK: tl.constexpr):
    """The same for elements that start anywhere, with one call of the generator for each."""
    index = first + tl.arange(0, BLOCK)
    a, b, c, d = _philox(seed, step, index // 8)
    # The order of neighbours that reshaping joined tensors gives, in the other function.
    place = (index % 8).to(tl.int32)
    pair = place // 2
    word = tl.where(pair == 0, a, tl.where(pair == 1, b, tl.where(pair == 2, c, d)))
    return tl.where(place % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _philox(seed, step, counter):
    lower = (counter & 0xFFFFFFFF).to(tl.uint32)
    upper = (counter >> 32).to(tl.uint32)
    steps = tl.zeros_like(lower) + step.to(tl.uint32)
    return tl.philox(seed, lower, upper, steps, tl.zeros_like(lower), _ROUNDS)


@triton.jit
def nearest_integer(x):
    """A float32 between -2**22 and 2**22 rounded to an integral float32, ties to even."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float8_bits(x, MANTISSA: tl.constexpr):
    """A float32 as the bits of the nearest float8, ties to even, saturated: uint8.

    Args:
        MANTISSA: 3 for e4m3fn (largest 448), 2 for e5m2 (57344).
    """
    exponent_bias: tl.constexpr = 7 if MANTISSA == 3 else 15
    largest: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    smallest_normal: tl.constexpr = 1 - exponent_bias
    dropped: tl.constexpr = 23 - MANTISSA
    bits = bits_of(x)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    is_nan = size > _INFINITY
    clamped = tl.minimum(size.to(tl.float32, bitcast=True), largest)
    # Normal: round the bits, then move the exponent.  Subnormal: adding a large float rounds.
    kept = bits_of(clamped)
    rounded = (kept + ((1 << (dropped - 1)) - 1) + ((kept >> dropped) & 1)) >> dropped
    normal = rounded - ((127 - exponent_bias) << MANTISSA)
    magic_bits: tl.constexpr = (127 + smallest_normal - MANTISSA + 23) << 23
    magic = tl.full(x.shape, magic_bits, tl.uint32).to(tl.float32, bitcast=True)
    subnormal = bits_of(clamped + magic) - magic_bits
    is_normal = kept >= ((127 + smallest_normal) << 23)
    result = tl.where(is_normal, normal, subnormal)
    result = tl.where(is_nan, 0x7F, result)
    return (result | sign).to(tl.uint8)
