/* Listing what is large in a vector, or in gradient + residual while it is added up, and keeping
 * the largest. Everything is compared and copied as bit patterns; only sums are floats. */
#include "topq_kernels.h"

#include <string.h>

/* counts that stay in a core's first cache, and how few elements are not worth them */
enum { COUNTS = 1024, FEW = 256 };
/* how far memory is read ahead */
enum { AHEAD_BYTES = 2048 };

/* Past the caches, or each line would be read first: that costs as much as to read a gradient. */
#if defined(__clang__)
#define STREAM(vector, to) __builtin_nontemporal_store(vector, to)
#elif defined(__SSE2__)
typedef long long Longs __attribute__((vector_size(16), may_alias));
#define STREAM(vector, to) __builtin_ia32_movntdq((Longs *)(to), (Longs)(vector))
#else
#define STREAM(vector, to) (*(to) = (vector))
#endif

/* patterns, of what is a float elsewhere */
typedef uint16_t Key16 __attribute__((may_alias));
typedef uint32_t Key32 __attribute__((may_alias));
typedef uint64_t Key64 __attribute__((may_alias));

int64_t topq_abi(void)
{
    return TOPQ_ABI;
}

/* vectors of the compiler's own, of as many bytes as every machine has */
#define VECTOR_BYTES 16
typedef int8_t Bytes __attribute__((vector_size(VECTOR_BYTES), may_alias));
#if defined(__clang__)
#if __has_extension(ext_vector_type_boolean)
#define HAS_VECTORS_OF_BITS
#endif
#define EVEN_BYTES(a, b)                                                                           \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#else
#define EVEN_BYTES(a, b)                                                                           \
    __builtin_shuffle(a, b, (Bytes){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30})
#endif

/* Have so many bytes, of what lies a little further on, brought nearer: memory would stand still
 * while candidates are listed. Past the end that does nothing. */
static inline void prefetch(const void *here, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += LINE_BYTES)
        __builtin_prefetch((const char *)here + AHEAD_BYTES + at);
}

/* Bit i of the word says whether mask i, of TOPQ_LANES of a width, is all ones; others are zero. */
static inline uint64_t word_of(Bytes *masks, int width)
{
    for (int left = width * TOPQ_LANES / VECTOR_BYTES / 2; width > 1; width /= 2, left /= 2)
        for (int at = 0; at < left; at++)
            masks[at] = EVEN_BYTES(masks[2 * at], masks[2 * at + 1]);
    uint64_t word = 0;
#ifdef HAS_VECTORS_OF_BITS
    typedef _Bool Bits __attribute__((ext_vector_type(VECTOR_BYTES)));
    for (int part = 0; part < TOPQ_LANES / VECTOR_BYTES; part++) {
        const Bits bits = __builtin_convertvector(masks[part], Bits);
        uint16_t some;
        memcpy(&some, &bits, sizeof some);
        word |= (uint64_t)some << VECTOR_BYTES * part;
    }
#else
    for (int at = 0; at < TOPQ_LANES; at += 8) {
        uint64_t eight;
        memcpy(&eight, (const int8_t *)masks + at, sizeof eight);
        /* the product's highest byte collects a bit of each */
        word |= (((eight & 0x0101010101010101u) * 0x0102040810204080u) >> 56) << at;
    }
#endif
    return word;
}

#define KEY Key16
#define SIGNED int16_t
#define NAMED(name) name##_16
#include "select_accumulate.inc.h"

#define KEY Key32
#define SIGNED int32_t
#define FLOAT float
#define NAMED(name) name##_32
#include "select_accumulate.inc.h"

#define KEY Key64
#define SIGNED int64_t
#define FLOAT double
#define NAMED(name) name##_64
#include "select_accumulate.inc.h"

int64_t topq_find_reaching(int64_t width, const void *vector, void *residual, int64_t numel,
                           int64_t low, int64_t begin, int64_t *indices, void *numbers,
                           int64_t room, int64_t found, void *before, int64_t *added)
{
    if (width == 2 && residual == NULL)
        return find_16(vector, NULL, numel, (int16_t)low, begin, indices, numbers, room, found,
                       NULL, NULL);
    if (width == 4)
        return find_32(vector, residual, numel, (int32_t)low, begin, indices, numbers, room, found,
                       before, added);
    if (width == 8)
        return find_64(vector, residual, numel, low, begin, indices, numbers, room, found, before,
                       added);
    return TOPQ_UNKNOWN;
}

int64_t topq_keep_largest(int64_t width, const int64_t *indices, const void *bits, int64_t count,
                          int64_t k, void *near, int64_t *top, void *top_bits, int64_t *outcome)
{
    if (width == 2)
        keep_16(indices, bits, count, k, near, top, top_bits, outcome);
    else if (width == 4)
        keep_32(indices, bits, count, k, near, top, top_bits, outcome);
    else if (width == 8)
        keep_64(indices, bits, count, k, near, top, top_bits, outcome);
    else
        return TOPQ_UNKNOWN;
    return 0;
}

int64_t topq_select_segments(int64_t width, const void *vector, const void *residual, int64_t begin,
                             const int64_t *plan, int64_t segments, const void *lows,
                             int64_t *indices, void *numbers, void *near, int64_t *top,
                             void *top_bits, int64_t *outcomes)
{
    if (width == 2 && residual == NULL)
        select_16(vector, NULL, begin, plan, segments, lows, indices, numbers, near, top, top_bits,
                  outcomes);
    else if (width == 4)
        select_32(vector, residual, begin, plan, segments, lows, indices, numbers, near, top,
                  top_bits, outcomes);
    else if (width == 8)
        select_64(vector, residual, begin, plan, segments, lows, indices, numbers, near, top,
                  top_bits, outcomes);
    else
        return TOPQ_UNKNOWN;
    return 0;
}

int64_t topq_find_differing(int64_t width, const void *ours, const void *theirs, int64_t numel,
                            int64_t *indices, int64_t room)
{
    if (width == 2)
        return differ_16(ours, theirs, numel, indices, room);
    if (width == 4)
        return differ_32(ours, theirs, numel, indices, room);
    if (width == 8)
        return differ_64(ours, theirs, numel, indices, room);
    return TOPQ_UNKNOWN;
}
