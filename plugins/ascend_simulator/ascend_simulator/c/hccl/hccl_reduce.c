// Element types and reductions.
#include "hccl.h"

#include <string.h>

size_t element_size(int type) {
    switch (type) {
        case INT8: case UINT8: return 1;
        case INT16: case UINT16: case FP16: case BF16: return 2;
        case INT32: case UINT32: case FP32: return 4;
        case INT64: case UINT64: case FP64: return 8;
        default: return 0;
    }
}

static float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float widen_bf16(uint16_t half) { return from_bits((uint32_t)half << 16); }

static uint16_t narrow_bf16(float value) {
    uint32_t bits = to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // adding to a NaN could carry it into infinity
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float widen_fp16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
    if (exponent == 31u) return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0u) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;
    return from_bits(sign | (exponent + 112u) << 23 | fraction << 13);
}

// Drops the low bits of `value`, rounding to nearest and ties to even.
static uint32_t shift_rounded(uint32_t value, unsigned shift) {
    uint32_t kept = value >> shift, rest = value & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    return kept + (rest > half || (rest == half && (kept & 1u)));
}

static uint16_t narrow_fp16(float value) {
    uint32_t bits = to_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (magnitude >= 0x47800000u) return (uint16_t)(sign | 0x7c00u);
    // A carry out of the fraction goes into the exponent, and out of the largest exponent into infinity: both right.
    if (magnitude >= 0x38800000u) return (uint16_t)(sign | shift_rounded(magnitude - 0x38000000u, 13));
    if (magnitude < 0x33000000u) return (uint16_t)sign;
    uint32_t fraction = (magnitude & 0x7fffffu) | 0x800000u;
    return (uint16_t)(sign | shift_rounded(fraction, 126u - (magnitude >> 23)));
}

#define COMBINE(a, b) \
    (reduction == SUM ? (a) + (b) : reduction == PRODUCT ? (a) * (b) : reduction == MAXIMUM ? ((a) > (b) ? (a) : (b)) \
                                                                                            : ((a) < (b) ? (a) : (b)))

#define REDUCE(type)                                                                           \
    {                                                                                          \
        type *x = into;                                                                        \
        const type *y = from;                                                                  \
        for (size_t i = 0; i < count; i++) x[i] = (type)COMBINE(x[i], y[i]);                   \
        return HCCL_OK;                                                                        \
    }

#define REDUCE_WIDENED(widen, narrow)                                                          \
    {                                                                                          \
        uint16_t *x = into;                                                                    \
        const uint16_t *y = from;                                                              \
        for (size_t i = 0; i < count; i++) {                                                   \
            float a = widen(x[i]), b = widen(y[i]);                                            \
            x[i] = narrow(COMBINE(a, b));                                                      \
        }                                                                                      \
        return HCCL_OK;                                                                        \
    }

hccl_status reduce_into(void *into, const void *from, size_t count, int type, int reduction) {
    if (reduction < SUM || reduction > MINIMUM) return HCCL_NOT_SUPPORTED;
    switch (type) {
        case INT8: REDUCE(int8_t)
        case INT16: REDUCE(int16_t)
        case INT32: REDUCE(int32_t)
        case INT64: REDUCE(int64_t)
        case FP32: REDUCE(float)
        case FP16: REDUCE_WIDENED(widen_fp16, narrow_fp16)
        case BF16: REDUCE_WIDENED(widen_bf16, narrow_bf16)
        default: return HCCL_NOT_SUPPORTED;  // unsigned types and fp64, as on the device
    }
}
