/* One width of select_accumulate.c: KEY, SIGNED of the same width, FLOAT where there is one. */

#define MAGNITUDE ((KEY)((KEY) ~(KEY)0 >> 1))

typedef SIGNED NAMED(Keys) __attribute__((vector_size(VECTOR_BYTES)));
typedef NAMED(Keys) NAMED(KeysAt) __attribute__((aligned(sizeof(KEY)), may_alias));
#define LANES_OF_VECTOR (int)(VECTOR_BYTES / sizeof(KEY))

static inline uint64_t NAMED(reached)(const KEY *bits, SIGNED low)
{
    const SIGNED below = (SIGNED)(low - 1);
    NAMED(Keys) masks[TOPQ_LANES / LANES_OF_VECTOR];
    for (int at = 0; at < TOPQ_LANES; at += LANES_OF_VECTOR)
        masks[at / LANES_OF_VECTOR] =
            (*(const NAMED(KeysAt) *)(bits + at) & (SIGNED)MAGNITUDE) > below;
    return word_of((Bytes *)masks, sizeof(KEY));
}

#ifdef FLOAT
typedef FLOAT NAMED(Floats) __attribute__((vector_size(VECTOR_BYTES)));
typedef NAMED(Floats) NAMED(FloatsAt) __attribute__((aligned(sizeof(FLOAT)), may_alias));

/* residual + more of TOPQ_LANES elements, to `sums` or, with before, to residual */
static inline uint64_t NAMED(reached_by_sums)(const FLOAT *more, FLOAT *residual, FLOAT *before,
                                              FLOAT *sums, SIGNED low)
{
    const SIGNED below = (SIGNED)(low - 1);
    NAMED(Keys) masks[TOPQ_LANES / LANES_OF_VECTOR];
    for (int line = 0; line < TOPQ_LANES; line += 4 * LANES_OF_VECTOR) {
        NAMED(Floats) was[4], sum[4];
        for (int part = 0; part < 4; part++) {
            const int at = line + part * LANES_OF_VECTOR;
            was[part] = *(const NAMED(FloatsAt) *)(residual + at);
            sum[part] = *(const NAMED(FloatsAt) *)(more + at) + was[part];
        }
        /* a line of the cache at once: one that is written in two parts costs twice as much */
        if (before != NULL)
            for (int part = 0; part < 4; part++)
                STREAM(was[part], (NAMED(Floats) *)(before + line + part * LANES_OF_VECTOR));
        for (int part = 0; part < 4; part++) {
            const int at = line + part * LANES_OF_VECTOR;
            *(NAMED(FloatsAt) *)(sums + at) = sum[part];
            masks[at / LANES_OF_VECTOR] = ((NAMED(Keys))sum[part] & (SIGNED)MAGNITUDE) > below;
        }
    }
    return word_of((Bytes *)masks, sizeof(KEY));
}

/* The same of fewer elements. */
static inline uint64_t NAMED(reached_by_few)(const FLOAT *more, FLOAT *residual, FLOAT *before,
                                             FLOAT *sums, SIGNED low, int count)
{
    FLOAT padded[TOPQ_LANES] = {0};
    for (int at = 0; at < count; at++)
        padded[at] = more[at] + residual[at];
    if (before != NULL)
        memcpy(before, residual, (size_t)count * sizeof(FLOAT));
    memcpy(sums, padded, (size_t)count * sizeof(FLOAT));
    return NAMED(reached)((const KEY *)padded, low);
}
#endif

/* Write the lowest of the word's elements; of none, that at `last`. */
static inline void NAMED(list)(const KEY *bits, int last, int64_t begin, uint64_t word,
                               int64_t *index, KEY *number)
{
    const int at = __builtin_ctzll(word | (uint64_t)1 << last);
    *index = begin + at;
    *number = bits[at];
}

static int64_t NAMED(find)(const KEY *vector, void *residual, int64_t numel, SIGNED low,
                           int64_t begin, int64_t *restrict indices, KEY *restrict numbers,
                           int64_t room, int64_t found, void *before, int64_t *added)
{
    for (int64_t block = 0; block < numel; block += TOPQ_LANES) {
        const int count = (int)MIN(numel - block, TOPQ_LANES);
        const KEY *bits = vector + block;
        uint64_t word;
        prefetch(vector + block, sizeof(KEY) * TOPQ_LANES);
        if (residual != NULL)
            prefetch((const KEY *)residual + block, sizeof(KEY) * TOPQ_LANES);
#ifdef FLOAT
        FLOAT scratch[TOPQ_LANES];
        if (residual != NULL) {
            const FLOAT *more = (const FLOAT *)bits;
            FLOAT *here = (FLOAT *)residual + block, *sums = before == NULL ? scratch : here;
            FLOAT *was = before == NULL ? NULL : (FLOAT *)before + block;
            word = count == TOPQ_LANES ? NAMED(reached_by_sums)(more, here, was, sums, low)
                                       : NAMED(reached_by_few)(more, here, was, sums, low, count);
            bits = (const KEY *)sums;
        } else
#else
        (void)residual;
#endif
            if (count == TOPQ_LANES) {
            word = NAMED(reached)(bits, low);
        } else {
            KEY padded[TOPQ_LANES] = {0};
            memcpy(padded, bits, (size_t)count * sizeof(KEY));
            word = NAMED(reached)(padded, low);
        }
        if (count < TOPQ_LANES)
            word &= ((uint64_t)1 << count) - 1;
        if (found > room - TOPQ_LANES) {
            if (before == NULL)
                return found;
            continue;
        }
        /* two are written whether they count or not: where one in a hundred does, a loop that ends
         * after none, one or two costs more than they do */
        const int64_t end = found + __builtin_popcountll(word);
        for (int entry = 0; entry < 2; entry++, word &= word - 1)
            NAMED(list)(bits, count - 1, begin + block, word, indices + found + entry,
                        numbers + found + entry);
        for (int64_t entry = found + 2; entry < end; entry++, word &= word - 1)
            NAMED(list)(bits, count - 1, begin + block, word, indices + entry, numbers + entry);
        found = end;
    }
    /* here, since what interrupts Python does so only once this has returned */
    if (before != NULL)
        *added += numel;
    return found;
}

/* The k-th largest of `count` keys, few and by no means all alike; they change places. */
static KEY NAMED(kth_of_few)(KEY *keys, int64_t count, int64_t k)
{
    int64_t low = 0, high = count - 1;
    const int64_t place = k - 1;
    while (low < high) {
        const KEY pivot = keys[low + (high - low) / 2];
        int64_t left = low, right = high;
        while (left <= right) {
            while (keys[left] > pivot)
                left++;
            while (keys[right] < pivot)
                right--;
            if (left <= right) {
                const KEY key = keys[left];
                keys[left++] = keys[right];
                keys[right--] = key;
            }
        }
        if (place <= right)
            high = right;
        else if (place >= left)
            low = left;
        else
            return pivot;
    }
    return keys[low];
}

/* Leave only those of the keys, all in [lowest, highest], that share a narrow range with the k-th
 * largest; return how many of those above it there are, and narrow down what is pointed to. */
static int64_t NAMED(narrow)(KEY *keys, int64_t *count, int64_t k, KEY *lowest, KEY *highest)
{
    int64_t counts[COUNTS] = {0};
    int shift = 0;
    while ((KEY)(*highest - *lowest) >> shift >= COUNTS)
        shift++;
    for (int64_t at = 0; at < *count; at++)
        counts[(KEY)(keys[at] - *lowest) >> shift]++;
    int64_t range = (KEY)(*highest - *lowest) >> shift, above = 0;
    while (above + counts[range] < k)
        above += counts[range--];
    int64_t left = 0;
    for (int64_t at = 0; at < *count; at++) {
        const KEY key = keys[at];
        keys[left] = key;
        left += (KEY)(key - *lowest) >> shift == (KEY)range;
    }
    *count = left;
    *lowest = (KEY)(*lowest + ((KEY)range << shift));
    const KEY most = (KEY)(((KEY)1 << shift) - 1);
    *highest = (KEY)(*highest - *lowest) < most ? *highest : (KEY)(*lowest + most);
    return above;
}

static void NAMED(keep)(const int64_t *restrict indices, const KEY *restrict bits, int64_t count,
                        int64_t k, KEY *restrict near, int64_t *restrict top,
                        KEY *restrict top_bits, int64_t *restrict outcome)
{
    KEY lowest = MAGNITUDE, highest = 0;
    for (int64_t at = 0; at < count; at++) {
        const KEY key = bits[at] & MAGNITUDE;
        near[at] = key;
        lowest = MIN(lowest, key);
        highest = MAX(highest, key);
    }
    const KEY largest = highest;
    int64_t left = count, ties = k;
    while (left > FEW && lowest != highest)
        ties -= NAMED(narrow)(near, &left, ties, &lowest, &highest);
    const KEY kth = lowest == highest ? lowest : NAMED(kth_of_few)(near, left, ties);
    for (int64_t at = 0; at < left; at++)
        ties -= near[at] > kth;
    int64_t entries = 0;
    for (int64_t at = 0; at < count; at++) {
        const KEY pattern = bits[at], key = pattern & MAGNITUDE;
        /* written whether it counts or not: a branch that is taken now and then costs more */
        top[entries] = indices[at];
        top_bits[entries] = pattern;
        const int tied = (key == kth) & (ties > 0);
        ties -= tied;
        entries += (key > kth) | tied;
    }
    outcome[0] = (int64_t)kth;
    outcome[1] = (int64_t)largest;
}

static void NAMED(select)(const KEY *vector, const void *residual, int64_t begin,
                          const int64_t *plan, int64_t segments, const SIGNED *lows,
                          int64_t *indices, KEY *numbers, KEY *near, int64_t *top, KEY *top_bits,
                          int64_t *outcomes)
{
    for (int64_t segment = 0; segment < segments; segment++, plan += 4, outcomes += 3) {
        const int64_t start = plan[0], numel = plan[1] - start, k = plan[2], limit = plan[3];
        const int64_t room = MIN(limit, numel) + 1 + TOPQ_LANES;
        /* nothing is written to it where there is no `before` */
        void *here = residual == NULL ? NULL : (void *)((const KEY *)residual + start);
        const int64_t found = NAMED(find)(vector + start, here, numel, lows[segment], begin + start,
                                          indices, numbers, room, 0, NULL, NULL);
        outcomes[0] = found;
        if (0 < k && k <= found && found <= limit)
            NAMED(keep)(indices, numbers, found, k, near, top, top_bits, outcomes + 1);
        top += k;
        top_bits += k;
    }
}

static int64_t NAMED(differ)(const KEY *ours, const KEY *theirs, int64_t numel,
                             int64_t *restrict indices, int64_t room)
{
    int64_t found = 0;
    for (int64_t block = 0; block < numel; block += TOPQ_LANES) {
        const int count = (int)MIN(numel - block, TOPQ_LANES);
        uint64_t word = 0;
        if (count == TOPQ_LANES) {
            NAMED(Keys) masks[TOPQ_LANES / LANES_OF_VECTOR];
            for (int at = 0; at < TOPQ_LANES; at += LANES_OF_VECTOR)
                masks[at / LANES_OF_VECTOR] = *(const NAMED(KeysAt) *)(ours + block + at) !=
                                              *(const NAMED(KeysAt) *)(theirs + block + at);
            word = word_of((Bytes *)masks, sizeof(KEY));
        }
        for (int at = 0; count < TOPQ_LANES && at < count; at++)
            word |= (uint64_t)(ours[block + at] != theirs[block + at]) << at;
        if (found + __builtin_popcountll(word) > room)
            return -1;
        for (; word != 0; word &= word - 1)
            indices[found++] = block + __builtin_ctzll(word);
    }
    return found;
}

#undef LANES_OF_VECTOR
#undef MAGNITUDE
#undef KEY
#undef SIGNED
#undef FLOAT
#undef NAMED
