"""One step of an optimizer over all parameters in one launch: AdamW, SGD with momentum, Lion.

A program updates a block of one parameter.  Parameters and gradients are where they are; states
lie in arenas, one of each kind, in which a parameter begins at a multiple of 256
elements.  What
a program needs stands in a row of a table in device memory:

    block 17:  parameter's address | gradient's address | place in arenas | index in the model
               | elements | whole and aligned? | row of scalars

Learning rates, corrections and numbers of steps are in device memory, too, a row of scalars for
each parameter, so that no step compiles anything and a CUDA graph replays right.

How a weight is kept:  float32 | bfloat16 with 16 or 8 bits of low (``numerics.split``) | bfloat16,
rounded to nearest or stochastically.  Moments: float32 | bfloat16 | 8 bits with a scale for
QUANTUM neighbours (``moments``).
"""

import triton
import triton.language as tl

from fxzero.kernels import moments, numerics

BLOCK, QUANTIZED_BLOCK = 1024, 2048
COLUMNS, SCALARS = 8, 16

_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
_SCALARS: tl.constexpr = tl.constexpr(SCALARS)


@triton.jit
def update(
    blocks,
    scalars,
    control,
    seed,
    lows,
    firsts,
    seconds,
    first_scales,
    second_scales,
    RULE: tl.constexpr,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    LOW_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    QUANTUM: tl.constexpr,
    EXACT: tl.constexpr,
    TAILS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates parameters and states in place, one program a row of ``blocks``.

    Args:
        blocks: int64 [programs, 8], as above.
        scalars: float32 [parameters, 16], as the rule reads them; the last two are the sign of
            gradients and the number of the step that this is, 1 for the first.
        control: float32 [2]: what to multiply gradients by, and whether to leave all as it is.
        seed: int64 [1], of stochastic rounding.
        lows: int16 or int8 arena of what bfloat16 weights have lost.
        firsts, seconds: arenas of moments.
        first_scales, second_scales: float32 arenas, one for QUANTUM elements.
        RULE: "adamw", "sgd" or "lion".
        PARAMETER, GRADIENT: dtypes.
        LOW_BITS: 0, 8 or 16.
        QUANTUM: elements of a scale, or 0: moments are floats.
        TAILS: whether any block is not whole and aligned.
    """
    if tl.load(control + 1) != 0.0:
        return
    row = blocks + tl.program_id(0).to(tl.int64) * _COLUMNS
    weights = tl.load(row).to(tl.pointer_type(PARAMETER))
    gradients = tl.load(row + 1).to(tl.pointer_type(GRADIENT))
    place = tl.multiple_of(tl.load(row + 2), QUANTUM if QUANTUM else 16)
    index = tl.load(row + 3)
    whole = tl.load(row + 5) != 0
    values = scalars + tl.load(row + 6) * _SCALARS
    factor = tl.load(control) * tl.load(values + _SCALARS - 2)
    if whole:
        weights = tl.multiple_of(weights, 16)
        gradients = tl.multiple_of(gradients, 16)
        # fmt: off
        _block(weights, gradients, place, index, BLOCK, values, factor, seed, lows,
               firsts, seconds, first_scales, second_scales,
               RULE, LOW_BITS, STOCHASTIC, QUANTUM, EXACT, False, BLOCK)
        # fmt: on
    elif TAILS:
        count = tl.load(row + 4)
        # fmt: off
        _block(weights, gradients, place, index, count, values, factor, seed, lows,
               firsts, seconds, first_scales, second_scales,
               RULE, LOW_BITS, STOCHASTIC, QUANTUM, EXACT, True, BLOCK)
        # fmt: on


@triton.jit
def _block(
    weights,
    gradients,
    place,
    index,
    count,
    values,
    factor,
    seed,
    lows,
    firsts,
    seconds,
    first_scales,
    second_scales,
    RULE: tl.constexpr,
    LOW_BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    QUANTUM: tl.constexpr,
    EXACT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block; MASKED: of ``count`` elements that may start anywhere."""
    i = tl.arange(0, BLOCK)
    mask = i < count if MASKED else None
    gradient = numerics.to_float32(tl.load(gradients + i, mask)) * factor
    weight = tl.load(weights + i, mask)
    if LOW_BITS:
        weight = numerics.join(weight, tl.load(lows + place + i, mask), LOW_BITS)
    else:
        weight = numerics.to_float32(weight)
    if STOCHASTIC or QUANTUM:
        step = tl.load(values + _SCALARS - 1).to(tl.int32)
        if MASKED:
            random = numerics.random_bits_anywhere(tl.load(seed), step, index, BLOCK)
        else:
            random = numerics.random_bits(tl.load(seed), step, index, BLOCK)

    if QUANTUM:
        scales = place // QUANTUM + tl.arange(0, BLOCK // QUANTUM)
        some = tl.arange(0, BLOCK // QUANTUM) * QUANTUM < count if MASKED else None
        first = moments.signed(
            tl.load(firsts + place + i, mask), tl.load(first_scales + scales, some), QUANTUM
        )
    else:
        first = numerics.to_float32(tl.load(firsts + place + i, mask))
    if RULE == "adamw":
        if QUANTUM:
            second = moments.squared(
                tl.load(seconds + place + i, mask), tl.load(second_scales + scales, some), QUANTUM
            )
        else:
            second = numerics.to_float32(tl.load(seconds + place + i, mask))
        weight, first, second = adamw(weight, gradient, first, second, values, EXACT)
    elif RULE == "lion":
        weight, first = lion(weight, gradient, first, values)
    else:
        weight, first = sgd(weight, gradient, first, values)

    if LOW_BITS:
        high, low = numerics.split(weight, LOW_BITS)
        tl.store(lows + place + i, low, mask)
        tl.store(weights + i, high, mask)
    elif STOCHASTIC:
        tl.store(weights + i, numerics.stochastic_bfloat16(weight, random), mask)
    else:
        numerics.store_nearest(weights + i, weight, mask)
    if QUANTUM:
        if MASKED:
            first = tl.where(mask, first, 0.0)
        codes, scale = moments.signed_codes(first, random & 0xFF, QUANTUM)
        tl.store(firsts + place + i, codes, mask)
        tl.store(first_scales + scales, scale, some)
    else:
        numerics.store_nearest(firsts + place + i, first, mask)
    if RULE == "adamw":
        if QUANTUM:
            if MASKED:
                second = tl.where(mask, second, 0.0)
            codes, scale = moments.squared_codes(second, random >> 8, QUANTUM)
            tl.store(seconds + place + i, codes, mask)
            tl.store(second_scales + scales, scale, some)
        else:
            numerics.store_nearest(seconds + place + i, second, mask)


@triton.jit
def adamw(weight, gradient, first, second, values, EXACT: tl.constexpr):
    """AdamW (Loshchilov and Hutter, ICLR 2019), in the order of torch's fused kernels.

    Scalars: 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, lr / correction1,
    1 / sqrt(correction2), eps.
    """
    weight = weight * tl.load(values)
    first = first + (gradient - first) * tl.load(values + 1)
    second = second * tl.load(values + 2) + tl.load(values + 3) * gradient * gradient
    root = tl.sqrt_rn(second) if EXACT else tl.sqrt(second)
    root = root * tl.load(values + 5) + tl.load(values + 6)
    step = tl.load(values + 4) * first
    step = tl.div_rn(step, root) if EXACT else step / root
    return weight - step, first, second


@triton.jit
def lion(weight, gradient, first, values):
    """Lion (Chen et al., NeurIPS 2023).

    Scalars: 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2, lr.
    """
    direction = first * tl.load(values + 1) + gradient * tl.load(values + 2)
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))
    first = first * tl.load(values + 3) + gradient * tl.load(values + 4)
    return weight * tl.load(values) - sign * tl.load(values + 5), first


@triton.jit
def sgd(weight, gradient, first, values):
    """SGD with momentum, as torch has it.

    Scalars: decay, momentum, 1 - dampening (1 in the first step), lr, whether Nesterov's (0 or 1).
    """
    gradient = gradient + weight * tl.load(values)
    momentum = tl.load(values + 1)
    first = first * momentum + gradient * tl.load(values + 2)
    nesterov = tl.load(values + 4) != 0.0
    step = tl.where(nesterov, gradient + first * momentum, first)
    return weight - step * tl.load(values + 3), first
