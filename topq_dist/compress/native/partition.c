/* Dealing indices out to parts, and back, with a division a block. */
#include "topq_kernels.h"

void topq_split_indices(const int64_t *restrict indices, int64_t count, int64_t block_numel,
                        int64_t *restrict edges, int64_t parts, int64_t *restrict mine,
                        int64_t *restrict places)
{
    int64_t begin = 0, owner = 0, before = 0;
    for (int64_t at = 0; at < count; at++) {
        if ((uint64_t)(indices[at] - begin) >= (uint64_t)block_numel) {
            const int64_t block = indices[at] / block_numel;
            begin = block * block_numel;
            owner = block % parts;
        }
        edges[owner + 1]++;
    }
    for (int64_t part = 0; part < parts; part++)
        edges[part + 1] += edges[part];
    /* each start moves on to its end, which is where the next part starts */
    begin = owner = 0;
    for (int64_t at = 0; at < count; at++) {
        if ((uint64_t)(indices[at] - begin) >= (uint64_t)block_numel) {
            const int64_t block = indices[at] / block_numel;
            begin = block * block_numel;
            owner = block % parts;
            before = begin - block / parts * block_numel;
        }
        const int64_t entry = edges[owner]++;
        mine[entry] = at;
        places[entry] = indices[at] - before;
    }
    for (int64_t part = parts; part > 0; part--)
        edges[part] = edges[part - 1];
    edges[0] = 0;
}

void topq_indices_of_part(const int64_t *restrict places, int64_t count, int64_t block_numel,
                          int64_t parts, int64_t part, int64_t *restrict indices)
{
    int64_t begin = 0, before = part * block_numel;
    for (int64_t at = 0; at < count; at++) {
        if ((uint64_t)(places[at] - begin) >= (uint64_t)block_numel) {
            const int64_t rounds = places[at] / block_numel;
            begin = rounds * block_numel;
            before = (rounds * (parts - 1) + part) * block_numel;
        }
        indices[at] = places[at] + before;
    }
}
