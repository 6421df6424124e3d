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

int64_t topq_sums_of_quotients(int64_t width, const void *gaps, int64_t count, int64_t bits,
                               int64_t *sums, int64_t numbers)
{
    if (width != 4 && width != 8)
        return TOPQ_UNKNOWN;
    for (int64_t at = 0; at < numbers; at++)
        sums[at] = width == 4 ? sum_of_quotients_32(gaps, count, bits + at)
                              : sum_of_quotients_64(gaps, count, bits + at);
    return 0;
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

/* codes whose low bits are added up in one go: more than have their ends in a word */
enum { SUMMED = 512 };

/* Write the sums of `count` codes' low bits and of the 1 that each adds, from `sum` on; return the
 * last. The first one's fields begin a byte. */
static uint64_t sum_low_bits(const uint8_t *planes, int64_t plane_bytes, int whole,
                             const uint8_t *fields, int64_t fields_bytes, int width, int64_t count,
                             uint64_t sum, int64_t *restrict sums)
{
    uint64_t lows[SUMMED];
    const uint64_t mask = ((uint64_t)1 << width) - 1;
    for (int64_t at = 0; at < count; at += 8, fields += width, fields_bytes -= width) {
        /* 8 fields of 7 bits at most */
        uint64_t some = fields_bytes >= 8 ? next_word(fields, 8) : next_word(fields, fields_bytes);
        for (int field = 0; field < 8; field++, some >>= width)
            lows[at + field] = (some & mask) << 8 * whole;
    }
    for (int plane = 0; plane < whole; plane++)
        for (int64_t at = 0; at < count; at++)
            lows[at] |= (uint64_t)planes[plane * plane_bytes + at] << 8 * plane;
    for (int64_t at = 0; at < count; at++) {
        sum += lows[at] + 1;
        sums[at] = (int64_t)sum;
    }
    return sum;
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
    uint64_t sum = (uint64_t)-1;
    int64_t summed = 0, found = 0, last_bit = -1;
    for (int64_t at_byte = 0; at_byte < unary_bytes; at_byte += 8) {
        uint64_t word = unary_bytes - at_byte >= 8
                            ? next_word(unary + at_byte, 8)
                            : next_word(unary + at_byte, unary_bytes - at_byte);
        int64_t end = found + __builtin_popcountll(word);
        const int is_more = end > count;
#ifndef TOPQ_BREAK_A_BOUND /* for a test that shows that this would be noticed */
        end = is_more ? count : end;
#endif
        if (summed < end) {
            const int64_t size = MIN(count - summed, SUMMED), from = summed / 8 * width;
            sum = sum_low_bits(planes + summed, count, whole, fields + from, fields_bytes - from,
                               width, size, sum, indices + summed);
            summed += size;
        }
        for (; found < end; found++, word &= word - 1) {
            last_bit = 8 * at_byte + __builtin_ctzll(word);
            indices[found] += (int64_t)((uint64_t)(last_bit - found) << bits);
        }
        /* 64 codes at most since the last look: no sum has left its 64 bits */
        if (found > 0 && ((uint64_t)(last_bit - found + 1) > LARGEST_INDEX >> bits ||
                          (uint64_t)indices[found - 1] > LARGEST_INDEX))
            return TOPQ_RANGE;
        if (is_more) {
            outcome[0] = count + 1;
            outcome[1] = last_bit;
            return 0;
        }
    }
    outcome[0] = found;
    outcome[1] = last_bit;
    return 0;
}
