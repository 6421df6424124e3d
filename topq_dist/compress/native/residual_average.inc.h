/* One width of residual_average.c: FLOAT. */

/* Add to out, which begins at `begin`, what comes next in each list and lies in it. */
static void NAMED(add_terms)(FLOAT *restrict out, int64_t numel, int64_t begin,
                             const int64_t *const *terms, const void *const *summands,
                             int64_t *restrict next_term, const int64_t *ends, int64_t lists)
{
    for (int64_t list = 0; list < lists; list++) {
        const int64_t *restrict places = terms[list];
        const FLOAT *restrict numbers = summands[list];
        int64_t at = next_term[list];
        for (; at < ends[list]; at++) {
            /* below zero is far above any size */
            const uint64_t place = (uint64_t)places[at] - (uint64_t)begin;
            if (place >= (uint64_t)numel)
                break;
            out[place] += numbers[at];
        }
        next_term[list] = at;
    }
}

static int64_t NAMED(update)(FLOAT *residual, FLOAT *gradient, int64_t numel, int64_t begin,
                             const int64_t *restrict indices, const FLOAT *restrict rest,
                             int64_t count, int64_t replace, const int64_t *const *terms,
                             const void *const *summands, int64_t *next_term, const int64_t *ends,
                             int64_t lists)
{
    int64_t written = 0;
    for (int64_t start = 0; start < numel; start += UPDATED) {
        const int64_t size = MIN(numel - start, UPDATED);
        FLOAT *restrict here = residual + start, *restrict more = gradient + start;
        int64_t at = 0;
        for (const int64_t line = LINE_BYTES / sizeof(FLOAT); at + line <= size; at += line) {
            /* or memory would stand still while terms are added */
            __builtin_prefetch(here + at + UPDATED, 1);
            __builtin_prefetch(more + at + UPDATED, 1);
            for (int64_t place = at; place < at + line; place++)
                here[place] += more[place];
        }
        for (; at < size; at++)
            here[at] += more[at];
        for (; written < count; written++) {
            const uint64_t place = (uint64_t)indices[written] - (uint64_t)(begin + start);
            if (place >= (uint64_t)size)
                break;
            here[place] = rest[written];
        }
        if (replace) {
            memset(more, 0, (size_t)size * sizeof *more);
            NAMED(add_terms)(more, size, begin + start, terms, summands, next_term, ends, lists);
        }
    }
    return written == count && at_ends(next_term, ends, lists);
}

static int64_t NAMED(sum)(const int64_t *const *terms, const void *const *summands,
                          int64_t *next_term, const int64_t *ends, int64_t lists, int64_t numel,
                          FLOAT *window, int64_t window_numel, int64_t *indices, void *numbers,
                          int64_t room)
{
    int64_t found = 0;
    for (int64_t start = 0; start < numel; start += window_numel) {
        const int64_t size = MIN(numel - start, window_numel);
        memset(window, 0, (size_t)size * sizeof *window);
        NAMED(add_terms)(window, size, start, terms, summands, next_term, ends, lists);
        found = topq_find_reaching(sizeof *window, window, NULL, size, 1, start, indices, numbers,
                                   room, found, NULL, NULL);
    }
    return at_ends(next_term, ends, lists) ? found : -1;
}

static int64_t NAMED(scatter)(FLOAT *restrict out, int64_t numel, const int64_t *restrict indices,
                              const FLOAT *restrict values, int64_t count)
{
    for (int64_t at = 0; at < count; at++) {
        const uint64_t place = (uint64_t)indices[at];
        if (place >= (uint64_t)numel)
            return 0;
        out[place] += values[at];
    }
    return 1;
}

#undef FLOAT
#undef NAMED
