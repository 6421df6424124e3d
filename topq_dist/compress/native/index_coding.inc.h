/* One width of index_coding.c: GAP. */

static int64_t NAMED(gaps_between)(const int64_t *restrict indices, int64_t count, int64_t numel,
                                   GAP *restrict gaps)
{
    int64_t previous = -1;
    for (int64_t at = 0; at < count; at++) {
        const int64_t index = indices[at];
        if (index <= previous || index >= numel)
            return 0;
        gaps[at] = (GAP)(index - previous - 1);
        previous = index;
    }
    return 1;
}

static int64_t NAMED(sum_of_quotients)(const GAP *gaps, int64_t count, int64_t bits)
{
    int64_t total = 0;
    for (int64_t at = 0; at < count; at++)
        total += gaps[at] >> bits;
    return total;
}

static void NAMED(write_gaps)(const GAP *restrict gaps, int64_t count, int64_t bits,
                              uint8_t *restrict unary, uint8_t *restrict planes,
                              uint8_t *restrict fields)
{
    const int whole = (int)bits / 8, width = (int)bits % 8;
    const GAP mask = (GAP)(((GAP)1 << width) - 1);
    uint32_t held = 0;
    int filled = 0;
    int64_t bit = -1;
    for (int64_t at = 0; at < count; at++) {
        const GAP gap = gaps[at];
        bit += (gap >> bits) + 1;
        unary[bit >> 3] |= (uint8_t)(1 << (bit & 7));
        for (int plane = 0; plane < whole; plane++)
            planes[plane * count + at] = (uint8_t)(gap >> 8 * plane);
        if (width) {
            held |= (uint32_t)(gap >> 8 * whole & mask) << filled;
            filled += width;
            if (filled >= 8) {
                *fields++ = (uint8_t)held;
                held >>= 8;
                filled -= 8;
            }
        }
    }
    if (filled)
        *fields = (uint8_t)held;
}

#undef GAP
#undef NAMED
