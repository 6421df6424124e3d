/* Many small tensors and one flat vector, in one call. */
#include "topq_kernels.h"

#include <string.h>

void topq_gather_tensors(const int64_t *addresses, const int64_t *edges_bytes, int64_t tensors,
                         uint8_t *flat)
{
    for (int64_t tensor = 0; tensor < tensors; tensor++)
        memcpy(flat + edges_bytes[tensor], (const void *)(intptr_t)addresses[tensor],
               (size_t)(edges_bytes[tensor + 1] - edges_bytes[tensor]));
}

#define SCATTER(PATTERN, NAME)                                                                     \
    static int64_t NAME(const int64_t *addresses, const int64_t *edges, int64_t tensors,           \
                        const PATTERN *flat, const int64_t *indices, int64_t count)                \
    {                                                                                              \
        int64_t tensor = 0, previous = -1;                                                         \
        for (int64_t at = 0; at < count; at++) {                                                   \
            const int64_t index = indices[at];                                                     \
            if (index <= previous || index >= edges[tensors])                                      \
                return 0;                                                                          \
            while (index >= edges[tensor + 1])                                                     \
                tensor++;                                                                          \
            ((PATTERN *)(intptr_t)addresses[tensor])[index - edges[tensor]] = flat[index];         \
            previous = index;                                                                      \
        }                                                                                          \
        return 1;                                                                                  \
    }

SCATTER(uint16_t, scatter_16)
SCATTER(uint32_t, scatter_32)
SCATTER(uint64_t, scatter_64)

int64_t topq_scatter_to_tensors(int64_t width, const int64_t *addresses, const int64_t *edges,
                                int64_t tensors, const void *flat, const int64_t *indices,
                                int64_t count)
{
    if (width == 2)
        return scatter_16(addresses, edges, tensors, flat, indices, count);
    if (width == 4)
        return scatter_32(addresses, edges, tensors, flat, indices, count);
    if (width == 8)
        return scatter_64(addresses, edges, tensors, flat, indices, count);
    return TOPQ_UNKNOWN;
}
