/* Ascending indices as gaps, and gaps in Rice code. */
#include "topq_kernels.h"

#include <string.h>

/* with bits below this, and indices up to there, no sum leaves 64 bits */
#define LARGEST_BITS 55
#define LARGEST_INDEX ((uint64_t)1 << 56)

#define GAP int32_t
#define NAMED(name) name##_32
#include "index_coding.inc.h"

#define GAP int64_t
#define NAMED(name) name##_64
#include "index_coding.inc.h"

int64_t topq_gaps_between(int64_t width, const int64_t *indices, int64_t count, int64_t numel,
                          void *gaps)
{
    if (width == 4)
        return gaps_between_32(indices, count, numel, gaps);
    if (width == 8)
        return gaps_between_64(indices, count, numel, gaps);
    return TOPQ_UNKNOWN;
}

int64_t topq_sum_of_quotients(int64_t width, const void *gaps, int64_t count, int64_t bits)
{
    if (width == 4)
        return sum_of_quotients_32(gaps, count, bits);
    if (width == 8)
        return sum_of_quotients_64(gaps, count, bits);
    return TOPQ_UNKNOWN;
}

int64_t topq_write_gaps(int64_t width, const void *gaps, int64_t count, int64_t bits,
                        uint8_t *unary, uint8_t *planes, uint8_t *fields)
{
    if (width == 4)
        write_gaps_32(gaps, count, bits, unary, planes, fields);
    else if (width == 8)
        write_gaps_64(gaps, count, bits, unary, planes, fields);
    else
        return TOPQ_UNKNOWN;
    return 0;
}

/* The bytes of a stream that are left, 8 at most, as a number, the first one lowest. */
static inline uint64_t next_word(const uint8_t *bytes, int64_t left)
{
    uint64_t word = 0;
    memcpy(&word, bytes, (size_t)(left < 8 ? left : 8));
    return word;
}

int64_t topq_read_gaps(const uint8_t *unary, int64_t unary_bytes, const uint8_t *planes,
                       int64_t planes_bytes, const uint8_t *fields, int64_t fields_bytes,
                       int64_t bits, int64_t *indices, int64_t count, int64_t *outcome)
{
    if (bits < 0 || bits > LARGEST_BITS)
        return TOPQ_UNKNOWN;
    const int whole = (int)bits / 8, width = (int)bits % 8;
    if (planes_bytes / (whole ? whole : 1) < (whole ? count : 0) ||
        fields_bytes < (count * width + 7) / 8)
        return TOPQ_RANGE;
    const uint8_t *const end_of_fields = fields + fields_bytes;
    uint64_t held = 0, index = (uint64_t)-1;
    int filled = 0;
    int64_t found = 0, last_bit = -1;
    for (int64_t at_byte = 0; at_byte < unary_bytes; at_byte += 8) {
        uint64_t word = unary_bytes - at_byte >= 8
                            ? next_word(unary + at_byte, 8)
                            : next_word(unary + at_byte, unary_bytes - at_byte);
        for (; word != 0; word &= word - 1) {
#ifndef TOPQ_BREAK_A_BOUND /* for a test that shows that this would be noticed */
            if (found == count) {
                outcome[0] = count + 1;
                outcome[1] = last_bit;
                return 0;
            }
#endif
            const int64_t bit = 8 * at_byte + __builtin_ctzll(word);
            uint64_t gap = (uint64_t)(bit - last_bit - 1);
            if (gap > LARGEST_INDEX >> bits)
                return TOPQ_RANGE;
            gap <<= bits;
            last_bit = bit;
            for (int plane = 0; plane < whole; plane++)
                gap |= (uint64_t)planes[plane * count + found] << 8 * plane;
            if (width) {
                if (filled < width) {
                    const int64_t left = end_of_fields - fields, taken = left < 4 ? left : 4;
                    held |= (left < 4 ? next_word(fields, left) : next_word(fields, 4)) << filled;
                    fields += taken;
                    filled += 8 * (int)taken;
                }
                gap |= (held & ((1u << width) - 1)) << 8 * whole;
                held >>= width;
                filled -= width;
            }
            index += gap + 1;
            if (index > LARGEST_INDEX)
                return TOPQ_RANGE;
            indices[found++] = (int64_t)index;
        }
    }
    outcome[0] = found;
    outcome[1] = last_bit;
    return 0;
}
