/* The bits of fp32 numbers, and the part of them that bf16 has room for. */
#ifndef TOPQ_FLOAT_BITS_H
#define TOPQ_FLOAT_BITS_H

#include <stdint.h>
#include <string.h>

/* what is sent of a larger magnitude: fp32's largest power of two */
#define LARGEST 0x1p127f

/* vectors of the compiler's own, of as many bytes as every machine has */
enum { SUM_LANES = 8 };
typedef double Pair __attribute__((vector_size(16), may_alias));
typedef int64_t Flags __attribute__((vector_size(16)));

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

/* Cut off the bits that bf16 has no room for, in fp32. */
static inline float bf16_below(float number)
{
    return float_of(bits_of(number) & 0xffff0000u);
}

/* The sum of lanes, in pairs, as numpy does it. */
static inline double sum_of(const Pair *lanes)
{
    return ((lanes[0][0] + lanes[0][1]) + (lanes[1][0] + lanes[1][1])) +
           ((lanes[2][0] + lanes[2][1]) + (lanes[3][0] + lanes[3][1]));
}

#endif
