/* Values in few bits: fp16 scaled by a power of two, and blocks of levels between two numbers. */
#include "topq_kernels.h"
#include "float_bits.h"

/* how many values share two scales */
enum { BLOCK = 128 };

/* fp32's exponent is biased by 127 and fp16's by 15; fp32 has 13 more bits of mantissa. */
static inline uint16_t half_of(float number)
{
    const uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000u,
                   magnitude = bits & 0x7fffffffu;
    const uint32_t normal =
        (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    /* below the normal numbers: a sum with 0.5, whose last bit is worth 2**-24, is rounded as fp16
     */
    const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    return (uint16_t)(sign | (magnitude >= (113u << 23) ? normal : tiny));
}

void topq_round_to_half(const float *restrict numbers, int64_t count, float scale,
                        float *restrict scaled, uint16_t *restrict halves)
{
    for (int64_t at = 0; at < count; at++)
        scaled[at] = numbers[at] * scale;
    for (int64_t at = 0; at < count; at++)
        halves[at] = half_of(scaled[at]);
}

int64_t topq_widen_half(const uint16_t *restrict halves, int64_t count, float scale,
                        float *restrict widened)
{
    uint32_t beyond = 0;
    for (int64_t at = 0; at < count; at++) {
        const uint32_t half = halves[at], magnitude = half & 0x7fffu;
        /* numbers below the normal ones get a leading one that is taken off again */
        const uint32_t is_tiny = magnitude < 0x400u;
        const float leading = float_of(is_tiny ? 113u << 23 : 0u);
        const float number =
            (float_of((magnitude << 13) + ((112u + is_tiny) << 23)) - leading) * scale;
        beyond |= (uint32_t)(magnitude >= 0x7c00u) |
                  (uint32_t)((bits_of(number) & 0x7fffffffu) > 0x7f7fffffu);
        widened[at] = float_of(bits_of(number) ^ (half & 0x8000u) << 16);
    }
    return beyond == 0;
}

void topq_split_halves(const uint16_t *restrict halves, int64_t count, int64_t rotated,
                       uint8_t *restrict high, uint8_t *restrict low)
{
    if (rotated)
        for (int64_t at = 0; at < count; at++) {
            high[at] = (uint8_t)(halves[at] >> 7);
            low[at] = (uint8_t)(halves[at] << 1 | halves[at] >> 15);
        }
    else
        for (int64_t at = 0; at < count; at++) {
            high[at] = (uint8_t)(halves[at] >> 8);
            low[at] = (uint8_t)halves[at];
        }
}

void topq_join_halves(const uint8_t *restrict high, const uint8_t *restrict low, int64_t count,
                      int64_t rotated, uint16_t *restrict halves)
{
    if (rotated)
        for (int64_t at = 0; at < count; at++)
            halves[at] = (uint16_t)(high[at] << 7 | low[at] >> 1 | low[at] << 15);
    else
        for (int64_t at = 0; at < count; at++)
            halves[at] = (uint16_t)(high[at] << 8 | low[at]);
}

static inline float bf16_above(float number)
{
    return float_of((bits_of(number) + 0xffffu) & 0xffff0000u);
}

/* The scales of 4 and 8 bits: from the smallest magnitude, so that `top` steps reach the largest.
 */
static void spread_levels(const float *magnitudes, int count, float top, float *base, float *step)
{
    float smallest = magnitudes[0], largest = magnitudes[0];
    for (int at = 0; at < count; at++) {
        smallest = MIN(smallest, magnitudes[at]);
        largest = MAX(largest, magnitudes[at]);
    }
    *base = bf16_below(smallest);
    *step = bf16_above((largest - *base) / top);
}

/* The scales of 2 bits: the means of the magnitudes up to and above their mean, in SUM_LANES lanes.
 */
static void two_levels(const float *magnitudes, int count, float *base, float *step)
{
    const int size = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    Pair pairs[BLOCK / 2], lanes[SUM_LANES / 2] = {{0}}, larger[SUM_LANES / 2] = {{0}};
    double *const block = (double *)pairs;
    for (int at = 0; at < count; at++)
        block[at] = magnitudes[at];
    for (int at = count; at < size; at++)
        block[at] = 0.0;
    for (int at = 0; at < size / 2; at += SUM_LANES / 2)
        for (int lane = 0; lane < SUM_LANES / 2; lane++)
            lanes[lane] += pairs[at + lane];
    const double total = sum_of(lanes), mean = total / (double)count;
    Flags above_of[SUM_LANES / 2] = {{0}};
    for (int at = 0; at < size / 2; at += SUM_LANES / 2)
        for (int lane = 0; lane < SUM_LANES / 2; lane++) {
            const Flags is_above = pairs[at + lane] > (Pair){mean, mean};
            above_of[lane] -= is_above;
            larger[lane] += (Pair)((Flags)pairs[at + lane] & is_above);
        }
    const Flags counts = above_of[0] + above_of[1] + above_of[2] + above_of[3];
    const double count_above = (double)(counts[0] + counts[1]), sum_above = sum_of(larger);
    /* never all of them: a mean of fp32 numbers in fp64 is not below the smallest */
    const double below = (total - sum_above) / ((double)count - count_above);
    const double above = count_above > 0.0 ? sum_above / count_above : below;
    *base = bf16_below((float)below);
    *step = bf16_below((float)(above - (double)*base));
}

static void levels_of(const float *restrict magnitudes, int count, float base, float step,
                      float top, uint8_t *restrict levels)
{
    /* what is added to it and taken off again is rounded to whole numbers: its last bit is worth 1
     */
    const float whole = 12582912.0f;
    if (step == 0.0f) {
        for (int at = 0; at < count; at++)
            levels[at] = magnitudes[at] > base ? (uint8_t)top : 0;
        return;
    }
    for (int at = 0; at < count; at++) {
        const float level = (magnitudes[at] - base) / step;
        const float within = MIN(MAX(level, 0.0f), top);
        levels[at] = (uint8_t)(int32_t)((within + whole) - whole);
    }
}

static void values_of(const uint8_t *restrict codes, int count, float base, float step,
                      int code_bits, float *restrict values)
{
    const uint32_t mask = (1u << (code_bits - 1)) - 1;
    for (int at = 0; at < count; at++) {
        const uint32_t code = codes[at];
        const float number = (float)(int32_t)(code & mask) * step + base;
        values[at] = float_of(bits_of(number) | (code << (32 - code_bits) & 0x80000000u));
    }
}

/* Write whole bytes of codes, the first one in the lowest bits; return how many codes are left. */
static int pack(const uint8_t *codes, int count, int code_bits, uint8_t **packed)
{
    uint8_t *restrict out = *packed;
    const int each = 8 / code_bits, whole = count / each;
    if (code_bits == 2)
        for (int at = 0; at < whole; at++)
            out[at] = (uint8_t)(codes[4 * at] | codes[4 * at + 1] << 2 | codes[4 * at + 2] << 4 |
                                codes[4 * at + 3] << 6);
    else if (code_bits == 4)
        for (int at = 0; at < whole; at++)
            out[at] = (uint8_t)(codes[2 * at] | codes[2 * at + 1] << 4);
    else
        memcpy(out, codes, (size_t)whole);
    *packed += whole;
    return count - whole * each;
}

int64_t topq_encode_blocks(const float *restrict values, const int64_t *ks, int64_t segments,
                           int64_t code_bits, uint8_t *restrict scales, uint8_t *packed,
                           float *restrict decoded)
{
    if (code_bits != 2 && code_bits != 4 && code_bits != 8)
        return TOPQ_UNKNOWN;
    const int bits = (int)code_bits;
    const float top = (float)((1 << (bits - 1)) - 1);
    uint8_t codes[BLOCK + 8];
    float magnitudes[BLOCK];
    int held = 0;
    for (int64_t segment = 0; segment < segments; segment++) {
        for (int64_t left = ks[segment]; left > 0; left -= BLOCK) {
            const int count = (int)MIN(left, BLOCK);
            float base, step;
            for (int at = 0; at < count; at++) {
                const float magnitude = float_of(bits_of(values[at]) & 0x7fffffffu);
                magnitudes[at] = MIN(magnitude, LARGEST);
            }
            if (bits == 2)
                two_levels(magnitudes, count, &base, &step);
            else
                spread_levels(magnitudes, count, top, &base, &step);
            levels_of(magnitudes, count, base, step, top, codes + held);
            for (int at = 0; at < count; at++)
                codes[held + at] |= (uint8_t)(bits_of(values[at]) >> 31 << (bits - 1));
            values_of(codes + held, count, base, step, bits, decoded);
            const uint16_t both[2] = {(uint16_t)(bits_of(base) >> 16),
                                      (uint16_t)(bits_of(step) >> 16)};
            memcpy(scales, both, sizeof both);
            const int rest = pack(codes, held + count, bits, &packed);
            memmove(codes, codes + held + count - rest, (size_t)rest);
            held = rest;
            values += count;
            decoded += count;
            scales += sizeof both;
        }
    }
    if (held) {
        memset(codes + held, 0, 8);
        pack(codes, 8 / bits, bits, &packed);
    }
    return 0;
}

int64_t topq_decode_blocks(const uint8_t *restrict payload, int64_t payload_bytes,
                           const int64_t *ks, int64_t segments, int64_t code_bits,
                           float *restrict values, int64_t count)
{
    if (code_bits != 2 && code_bits != 4 && code_bits != 8)
        return TOPQ_UNKNOWN;
    const int bits = (int)code_bits, each = 8 / bits;
    int64_t blocks = 0, unlisted = count;
    for (int64_t segment = 0; segment < segments; segment++) {
        if (ks[segment] < 0 || ks[segment] > unlisted)
            return TOPQ_RANGE;
        unlisted -= ks[segment];
        blocks += ks[segment] / BLOCK + (ks[segment] % BLOCK != 0);
    }
    const int64_t whole = count / each, rest = count % each;
    if (unlisted != 0 || payload_bytes != 4 * blocks + whole + (rest != 0))
        return TOPQ_RANGE;
    if (rest != 0 && payload[payload_bytes - 1] >> rest * bits != 0)
        return TOPQ_PADDING;
    const uint8_t *packed = payload + 4 * blocks;
    uint8_t codes[BLOCK + 8];
    uint32_t beyond = 0;
    /* of the byte that the block begins in */
    int used = 0;
    for (int64_t segment = 0; segment < segments; segment++) {
        for (int64_t left = ks[segment]; left > 0; left -= BLOCK) {
            const int here = (int)MIN(left, BLOCK), bytes = (used + here + each - 1) / each;
            uint16_t both[2];
            memcpy(both, payload, sizeof both);
            payload += sizeof both;
            for (int at = 0; at < bytes; at++)
                for (int code = 0; code < each; code++)
                    codes[at * each + code] =
                        (uint8_t)(packed[at] >> code * bits & ((1 << bits) - 1));
            values_of(codes + used, here, float_of((uint32_t)both[0] << 16),
                      float_of((uint32_t)both[1] << 16), bits, values);
            for (int at = 0; at < here; at++)
                beyond |= (bits_of(values[at]) & 0x7fffffffu) > 0x7f7fffffu;
            packed += (used + here) / each;
            used = (used + here) % each;
            values += here;
        }
    }
    return beyond ? TOPQ_NOT_FINITE : 0;
}

#define FLOAT float
#define NAMED(name) name##_32
#include "half_lowbit.inc.h"
#define FLOAT double
#define NAMED(name) name##_64
#include "half_lowbit.inc.h"

int64_t topq_bound_rows(int64_t width, const void *values, const int64_t *ks,
                        const int64_t *row_numels, int64_t rows, double bound, void *bounded)
{
    if (width == 4)
        bound_rows_32(values, ks, row_numels, rows, bound, bounded);
    else if (width == 8)
        bound_rows_64(values, ks, row_numels, rows, bound, bounded);
    else
        return TOPQ_UNKNOWN;
    return 0;
}
