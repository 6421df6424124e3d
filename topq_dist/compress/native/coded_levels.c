/* Values as a sign and a level of their block's own steps, of which there are as many as it takes:
 * levels are few and unlike in number, for symbol_coding.c. */
#include "topq_kernels.h"

#include "float_bits.h"

#include <stddef.h>

/* how many values share a base and a step, the highest level there can be, and how many values are
 * looked at together */
enum { BLOCK = 4096, MOST_LEVEL = 255, CHUNK = 256 };

typedef int32_t Integers __attribute__((vector_size(16), may_alias));

typedef struct {
    float base, step;
} Scale;

typedef struct {
    float least, largest;
    double total;
} Extent;

/* Round to nearest, ties to even; none of them is near the largest of fp32. */
static inline float bf16_nearest(float number)
{
    const uint32_t bits = bits_of(number);
    return float_of((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

/* The sum of magnitudes, in fp64; of their products with `times`, where that is not NULL. Both go on
 * with zeros up to a whole number of SUM_LANES. */
static inline double weighted_sum(const float *magnitudes, const float *times, int count)
{
    const int size = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    Pair lanes[SUM_LANES / 2] = {{0}}, pairs[CHUNK / 2];
    double *const wide = (double *)pairs;
    for (int from = 0; from < size; from += CHUNK) {
        const int here = MIN(size - from, CHUNK);
        if (times == NULL)
            for (int at = 0; at < here; at++)
                wide[at] = (double)magnitudes[from + at];
        else
            for (int at = 0; at < here; at++)
                wide[at] = (double)magnitudes[from + at] * (double)times[from + at];
        for (int at = 0; at < here / 2; at += SUM_LANES / 2)
            for (int lane = 0; lane < SUM_LANES / 2; lane++)
                lanes[lane] += pairs[at + lane];
    }
    return sum_of(lanes);
}

/* Of numbers from 0 on the bits, as integers, are in the same order. */
static inline Integers lesser(Integers a, Integers b)
{
    const Integers first = a < b;
    return (a & first) | (b & ~first);
}

static inline Integers greater(Integers a, Integers b)
{
    const Integers first = a > b;
    return (a & first) | (b & ~first);
}

/* magnitudes go on with zeros up to a whole number of SUM_LANES. */
static Extent measure(const float *restrict values, int count, Integers *fours)
{
    float *const magnitudes = (float *)fours;
    const int size = (count + SUM_LANES - 1) / SUM_LANES * SUM_LANES;
    for (int at = 0; at < count; at++) {
        const float magnitude = float_of(bits_of(values[at]) & 0x7fffffffu);
        magnitudes[at] = MIN(magnitude, LARGEST);
    }
    for (int at = count; at < size; at++)
        magnitudes[at] = magnitudes[0];
    /* two of each, which do not wait for each other */
    Integers least[2] = {fours[0], fours[1]}, largest[2] = {fours[0], fours[1]};
    for (int at = 2; at < size / 4; at += 2)
        for (int half = 0; half < 2; half++) {
            least[half] = lesser(least[half], fours[at + half]);
            largest[half] = greater(largest[half], fours[at + half]);
        }
    Integers lowest = lesser(least[0], least[1]), highest = greater(largest[0], largest[1]);
    for (int lane = 1; lane < 4; lane++) {
        lowest[0] = MIN(lowest[0], lowest[lane]);
        highest[0] = MAX(highest[0], highest[lane]);
    }
    for (int at = count; at < size; at++)
        magnitudes[at] = 0.0f;
    return (Extent){float_of((uint32_t)lowest[0]), float_of((uint32_t)highest[0]),
                    weighted_sum(magnitudes, NULL, count)};
}

/* How many levels there are above the lowest, so that a step is about `ratio` of the mean excess
 * over the least magnitude, and their number to a unit of magnitude; half a step is left above the
 * largest, which may be many of one bound. */
static int steps_of(Extent extent, int count, double ratio, float *per_unit)
{
    const double span = (double)extent.largest - (double)extent.least;
    const double wanted = ratio * (extent.total / (double)count - (double)extent.least);
    *per_unit = 0.0f;
    if (!(span > 0.0 && wanted > 0.0))
        return 0;
    const double steps = MIN(span / wanted, (double)MOST_LEVEL);
    const int whole = (int)steps;
    const double inverse = ((double)whole + 0.5) / span;
    if (inverse >= (double)LARGEST)
        return 0;
    *per_unit = (float)inverse;
    return whole;
}

/* The base and step that are nearest to the magnitudes at these levels, by least squares; the base
 * to the rounded step, so that the sum of magnitudes stays what it is. */
static Scale scale_of(const Integers *fours, int count, Extent extent, int top, float per_unit,
                      uint8_t *restrict levels)
{
    const float *const magnitudes = (const float *)fours;
    const float highest = (float)top, least = extent.least;
    float as_floats[BLOCK];
    int16_t as_shorts[BLOCK];
    int32_t sum = 0, squares = 0;
    for (int at = 0; at < count; at++) {
        const float level = (magnitudes[at] - least) * per_unit;
        const int32_t whole = (int32_t)MIN(level, highest);
        as_floats[at] = (float)whole;
        as_shorts[at] = (int16_t)whole;
    }
    for (int at = count; at < count + SUM_LANES && at < BLOCK; at++)
        as_floats[at] = 0.0f;
    for (int at = 0; at < count; at++)
        levels[at] = (uint8_t)as_shorts[at];
    for (int at = 0; at < count; at++) {
        sum += as_shorts[at];
        squares += as_shorts[at] * as_shorts[at];
    }
    const double number = (double)count, levels_sum = (double)sum;
    const int64_t spread = (int64_t)count * squares - (int64_t)sum * sum;
    float step = 0.0f;
    if (spread > 0) {
        const double products = weighted_sum(magnitudes, as_floats, count);
        const double slope =
            (number * products - extent.total * levels_sum) / (double)spread;
        step = bf16_below((float)MAX(slope, 0.0));
    }
    const double base = (extent.total - (double)step * levels_sum) / number;
    return (Scale){bf16_nearest((float)MAX(base, 0.0)), step};
}

/* `signed_as` are numbers of the same signs. */
static void values_of(const uint8_t *restrict levels, const float *restrict signed_as, int count,
                      Scale scale, float *restrict values)
{
    for (int at = 0; at < count; at++) {
        const float number = (float)(int32_t)levels[at] * scale.step + scale.base;
        values[at] = float_of(bits_of(number) | (bits_of(signed_as[at]) & 0x80000000u));
    }
}

static void pack_signs(const float *values, int64_t count, uint8_t *restrict signs)
{
    for (int64_t at = 0; at < count / 8; at++) {
        uint64_t two[4], byte = 0;
        memcpy(two, values + 8 * at, sizeof two);
        for (int pair = 0; pair < 4; pair++)
            byte |= ((two[pair] >> 31 & 1) | (two[pair] >> 62 & 2)) << 2 * pair;
        signs[at] = (uint8_t)byte;
    }
    if (count % 8 != 0) {
        uint32_t byte = 0;
        for (int64_t bit = 0; bit < count % 8; bit++)
            byte |= bits_of(values[count / 8 * 8 + bit]) >> 31 << bit;
        signs[count / 8] = (uint8_t)byte;
    }
}

int64_t topq_encode_levels(const float *restrict values, const int64_t *ks, int64_t segments,
                           double ratio, uint8_t *restrict bases, uint8_t *restrict steps,
                           uint8_t *restrict signs, uint8_t *restrict levels,
                           float *restrict decoded)
{
    Integers magnitudes[BLOCK / 4];
    const float *const first = values;
    for (int64_t segment = 0; segment < segments; segment++)
        for (int64_t left = ks[segment]; left > 0; left -= BLOCK) {
            const int count = (int)MIN(left, BLOCK);
            float per_unit;
            const Extent extent = measure(values, count, magnitudes);
            const int top = steps_of(extent, count, ratio, &per_unit);
            const Scale scale = scale_of(magnitudes, count, extent, top, per_unit, levels);
            values_of(levels, values, count, scale, decoded);
            const uint16_t both[2] = {(uint16_t)(bits_of(scale.base) >> 16),
                                      (uint16_t)(bits_of(scale.step) >> 16)};
            memcpy(bases, &both[0], 2);
            bases += 2;
            if (count > 1) {
                memcpy(steps, &both[1], 2);
                steps += 2;
            }
            values += count;
            levels += count;
            decoded += count;
        }
    pack_signs(first, values - first, signs);
    return 0;
}

int64_t topq_decode_levels(const uint8_t *scales, int64_t scale_bytes, const uint8_t *signs,
                           int64_t sign_bytes, const uint8_t *restrict levels, const int64_t *ks,
                           int64_t segments, float *restrict values, int64_t count)
{
    int64_t blocks = 0, of_several = 0, unlisted = count;
    for (int64_t segment = 0; segment < segments; segment++) {
        const int64_t k = ks[segment];
        if (k < 0 || k > unlisted)
            return TOPQ_RANGE;
        unlisted -= k;
        blocks += k / BLOCK + (k % BLOCK != 0);
        of_several += k / BLOCK + (k % BLOCK > 1);
    }
    if (unlisted != 0 || scale_bytes != 2 * (blocks + of_several) ||
        sign_bytes != count / 8 + (count % 8 != 0))
        return TOPQ_RANGE;
    if (count % 8 != 0 && signs[sign_bytes - 1] >> count % 8 != 0)
        return TOPQ_PADDING;
    const uint8_t *steps = scales + 2 * blocks;
    float of_sign[BLOCK + 8];
    uint32_t beyond = 0;
    int64_t at = 0;
    for (int64_t segment = 0; segment < segments; segment++)
        for (int64_t left = ks[segment]; left > 0; left -= BLOCK) {
            const int here = (int)MIN(left, BLOCK), used = (int)(at % 8);
            uint16_t base, step = 0;
            memcpy(&base, scales, sizeof base);
            scales += sizeof base;
            if (here > 1) {
                memcpy(&step, steps, sizeof step);
                steps += sizeof step;
            }
            for (int byte = 0; byte < (used + here + 7) / 8; byte++)
                for (int bit = 0; bit < 8; bit++)
                    of_sign[8 * byte + bit] =
                        float_of((uint32_t)signs[at / 8 + byte] >> bit << 31);
            const Scale scale = {float_of((uint32_t)base << 16), float_of((uint32_t)step << 16)};
            values_of(levels + at, of_sign + used, here, scale, values + at);
            for (int64_t value = at; value < at + here; value++)
                beyond |= (bits_of(values[value]) & 0x7fffffffu) > 0x7f7fffffu;
            at += here;
        }
    return beyond ? TOPQ_NOT_FINITE : 0;
}
