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
    uint64_t word = 0;
    int64_t bit = -1, at_word = 0;
    for (int64_t at = 0; at < count; at++) {
        bit += (gaps[at] >> bits) + 1;
        if (bit >> 6 != at_word) {
            memcpy(unary + 8 * at_word, &word, sizeof word);
            at_word = bit >> 6;
            word = 0;
        }
        word |= (uint64_t)1 << (bit & 63);
    }
    if (count > 0)
        memcpy(unary + 8 * at_word, &word, (size_t)((bit & 63) / 8 + 1));
    for (int plane = 0; plane < whole; plane++)
        for (int64_t at = 0; at < count; at++)
            planes[plane * count + at] = (uint8_t)(gaps[at] >> 8 * plane);
    if (width == 0)
        return;
    const GAP mask = (GAP)(((GAP)1 << width) - 1);
    uint64_t held = 0;
    int filled = 0;
    for (int64_t at = 0; at < count; at++) {
        held |= (uint64_t)(gaps[at] >> 8 * whole & mask) << filled;
        filled += width;
        if (filled >= 32) {
            const uint32_t some = (uint32_t)held;
            memcpy(fields, &some, sizeof some);
            fields += sizeof some;
            held >>= 32;
            filled -= 32;
        }
    }
    memcpy(fields, &held, (size_t)(filled + 7) / 8);
}

#undef GAP
#undef NAMED
