/* Values in few bits: fp16 scaled by a power of two, and blocks of levels between two numbers. */
#include "topq_kernels.h"

#include <string.h>

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum { SUM_LANES = 8 };

static inline uint32_t bits_of(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

/* fp32's exponent is biased by 127 and fp16's by 15; fp32 has 13 more bits of mantissa. */
static inline uint16_t half_of(float number)
{
    const uint32_t bits = bits_of(number), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal =
        (magnitude - ((127u - 15u) << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    /* below the normal numbers: a sum with 0.5, whose last bit is worth 2**-24, is rounded as fp16 */
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
        beyond |= (uint32_t)(magnitude >= 0x7c00u) | (uint32_t)((bits_of(number) & 0x7fffffffu) > 0x7f7fffffu);
        widened[at] = float_of(bits_of(number) ^ (half & 0x8000u) << 16);
    }
    return beyond == 0;
}

static void range_of(const float *restrict numbers, int64_t count, float *low, float *high)
{
    float smallest = numbers[0], largest = numbers[0];
    for (int64_t at = 0; at < count; at++) {
        smallest = MIN(smallest, numbers[at]);
        largest = MAX(largest, numbers[at]);
    }
    *low = smallest;
    *high = largest;
}

static double sum_of(const double *numbers, int64_t count)
{
    double lanes[SUM_LANES] = {0};
    for (int64_t at = 0; at < count; at += SUM_LANES)
        for (int lane = 0; lane < SUM_LANES; lane++)
            lanes[lane] += numbers[at + lane];
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
           ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

/* `block` is scratch of `size`, of which `count` are filled */
static void means_of(const float *restrict numbers, int64_t count, double *restrict block,
                     int64_t size, double *below, double *above)
{
    for (int64_t at = 0; at < count; at++)
        block[at] = numbers[at];
    for (int64_t at = count; at < size; at++)
        block[at] = 0.0;
    const double total = sum_of(block, size), mean = total / (double)count;
    int64_t count_above = 0;
    for (int64_t at = 0; at < size; at++) {
        const int is_above = block[at] > mean;
        count_above += is_above;
        block[at] = is_above ? block[at] : 0.0;
    }
    const double sum_above = sum_of(block, size);
    /* never all of them: a mean of fp32 numbers in fp64 is not below the smallest */
    *below = (total - sum_above) / (double)(count - count_above);
    *above = count_above ? sum_above / (double)count_above : *below;
}

static void levels_of(const float *restrict numbers, int64_t count, float base, float step,
                      float top, uint8_t *restrict levels)
{
    /* what is added to it and taken off again is rounded to whole numbers: its last bit is worth 1 */
    const float whole = 12582912.0f;
    if (step == 0.0f) {
        for (int64_t at = 0; at < count; at++)
            levels[at] = numbers[at] > base ? (uint8_t)top : 0;
        return;
    }
    for (int64_t at = 0; at < count; at++) {
        const float level = (numbers[at] - base) / step;
        const float within = MIN(MAX(level, 0.0f), top);
        levels[at] = (uint8_t)(int32_t)((within + whole) - whole);
    }
}

static void values_of(const uint8_t *restrict codes, int64_t count, float base, float step,
                      int code_bits, float *restrict values)
{
    const uint32_t mask = (1u << (code_bits - 1)) - 1;
    for (int64_t at = 0; at < count; at++) {
        const uint32_t code = codes[at];
        const float number = (float)(int32_t)(code & mask) * step + base;
        values[at] = float_of(bits_of(number) | (code << (32 - code_bits) & 0x80000000u));
    }
}

/* The blocks of all segments in turn: next() goes to the first, and then to the next. */
typedef struct {
    const int64_t *ks, *end_of_ks;
    int64_t block_numel, block, start, stop, end;
} Blocks;

static inline Blocks blocks_of(const int64_t *ks, int64_t segments, int64_t block_numel)
{
    return (Blocks){.ks = ks, .end_of_ks = ks + segments, .block_numel = block_numel, .block = -1};
}

static inline int next(Blocks *at)
{
    at->start = at->stop;
    while (at->start == at->end) {
        if (at->ks == at->end_of_ks)
            return 0;
        at->end += *at->ks++;
    }
    at->stop = MIN(at->start + at->block_numel, at->end);
    at->block++;
    return 1;
}

void topq_magnitude_ranges(const float *restrict magnitudes, const int64_t *ks, int64_t segments,
                           int64_t block_numel, float *restrict low, float *restrict high)
{
    for (Blocks at = blocks_of(ks, segments, block_numel); next(&at);)
        range_of(magnitudes + at.start, at.stop - at.start, low + at.block, high + at.block);
}

void topq_two_means(const float *restrict magnitudes, const int64_t *ks, int64_t segments,
                    double *restrict block, int64_t block_numel, double *restrict below,
                    double *restrict above)
{
    for (Blocks at = blocks_of(ks, segments, block_numel); next(&at);)
        means_of(magnitudes + at.start, at.stop - at.start, block, block_numel, below + at.block,
                 above + at.block);
}

void topq_nearest_levels(const float *restrict magnitudes, const int64_t *ks, int64_t segments,
                         int64_t block_numel, const float *base, const float *step, float top,
                         uint8_t *restrict levels)
{
    for (Blocks at = blocks_of(ks, segments, block_numel); next(&at);)
        levels_of(magnitudes + at.start, at.stop - at.start, base[at.block], step[at.block], top,
                  levels + at.start);
}

void topq_values_of_levels(const uint8_t *restrict codes, const int64_t *ks, int64_t segments,
                           int64_t block_numel, const float *base, const float *step,
                           int64_t code_bits, float *restrict values)
{
    for (Blocks at = blocks_of(ks, segments, block_numel); next(&at);)
        values_of(codes + at.start, at.stop - at.start, base[at.block], step[at.block],
                  (int)code_bits, values + at.start);
}
