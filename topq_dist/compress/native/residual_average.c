/* Updating residuals, and adding up sparse vectors. */
#include "topq_kernels.h"

#include <string.h>

/* elements updated in one go: both vectors', and the next ones, stay in a core's first cache */
enum { UPDATED = 1024 };

/* Whether all of every list has been added up, none left out of order or range. */
static int at_ends(const int64_t *next_term, const int64_t *ends, int64_t lists)
{
    for (int64_t list = 0; list < lists; list++)
        if (next_term[list] != ends[list])
            return 0;
    return 1;
}

#define FLOAT float
#define NAMED(name) name##_32
#include "residual_average.inc.h"

#define FLOAT double
#define NAMED(name) name##_64
#include "residual_average.inc.h"

int64_t topq_update_residual_span(int64_t width, void *residual, void *gradient, int64_t numel,
                                  int64_t begin, const int64_t *indices, const void *rest,
                                  int64_t count, int64_t replace,
                                  const int64_t *const *terms, const void *const *summands,
                                  int64_t *next_term, const int64_t *ends, int64_t lists)
{
    if (width == 4)
        return update_32(residual, gradient, numel, begin, indices, rest, count, replace, terms,
                         summands, next_term, ends, lists);
    if (width == 8)
        return update_64(residual, gradient, numel, begin, indices, rest, count, replace, terms,
                         summands, next_term, ends, lists);
    return TOPQ_UNKNOWN;
}

int64_t topq_sum_terms(int64_t width, const int64_t *const *terms, const void *const *summands,
                       int64_t *next_term, const int64_t *ends, int64_t lists, int64_t numel,
                       void *window, int64_t window_numel, int64_t *indices, void *numbers,
                       int64_t room)
{
    if (width == 4)
        return sum_32(terms, summands, next_term, ends, lists, numel, window, window_numel, indices,
                      numbers, room);
    if (width == 8)
        return sum_64(terms, summands, next_term, ends, lists, numel, window, window_numel, indices,
                      numbers, room);
    return TOPQ_UNKNOWN;
}

int64_t topq_scatter_add(int64_t width, void *out, int64_t numel, const int64_t *indices,
                         const void *values, int64_t count)
{
    if (width == 4)
        return scatter_32(out, numel, indices, values, count);
    if (width == 8)
        return scatter_64(out, numel, indices, values, count);
    return TOPQ_UNKNOWN;
}
