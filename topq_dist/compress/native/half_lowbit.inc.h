/* One width of topq_bound_rows: FLOAT. */

/* The sum of magnitudes in fp64, added up as numpy does it: 8 lanes of up to 128 numbers, these in
 * pairs, and halves of more. */
static double NAMED(sum_of_magnitudes)(const FLOAT *values, int64_t count)
{
    if (count > BLOCK) {
        const int64_t half = count / 2 - count / 2 % SUM_LANES;
        return NAMED(sum_of_magnitudes)(values, half) +
               NAMED(sum_of_magnitudes)(values + half, count - half);
    }
    double lanes[SUM_LANES] = {0}, sum = 0.0;
    int64_t at = 0;
    for (; at + SUM_LANES <= count; at += SUM_LANES)
        for (int lane = 0; lane < SUM_LANES; lane++)
            lanes[lane] += __builtin_fabs((double)values[at + lane]);
    if (at > 0)
        sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
              ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    for (; at < count; at++)
        sum += __builtin_fabs((double)values[at]);
    return sum;
}

static void NAMED(bound_rows)(const FLOAT *restrict values, const int64_t *ks,
                              const int64_t *row_numels, int64_t rows, double bound,
                              FLOAT *restrict bounded)
{
    for (int64_t row = 0; row < rows; row++) {
        const int64_t k = ks[row];
        if (k <= 0)
            continue;
        /* the first one apart, as numpy's reduceat has it */
        const double sum =
            __builtin_fabs((double)values[0]) + NAMED(sum_of_magnitudes)(values + 1, k - 1);
        const FLOAT limit =
            2 * k >= row_numels[row] ? (FLOAT)__builtin_inf() : (FLOAT)(sum * (bound / (double)k));
        for (int64_t at = 0; at < k; at++) {
            const FLOAT value = values[at], below = MIN(value, limit);
            const FLOAT excess = value - MAX(below, -limit);
            /* one of sent and excess must give way for their sum to be the value */
            bounded[at] = value - excess;
        }
        values += k;
        bounded += k;
    }
}

#undef FLOAT
#undef NAMED
