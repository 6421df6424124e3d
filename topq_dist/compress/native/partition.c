/* Dealing indices out to parts, and back, with a division a run of blocks that hold nothing. */
#include "topq_kernels.h"

/* so many blocks further on are walked to, which is cheaper than a division */
enum { WALKED_BLOCKS = 8 };

/* Where a walk through ascending indices is: in the block that ends at `end`, of part `owner`, with
 * `before` elements of other parts before it. */
typedef struct {
    int64_t block_numel, parts, end, owner, before;
} Walk;

static inline void walk_to(Walk *walk, int64_t index)
{
    if (index - walk->end >= WALKED_BLOCKS * walk->block_numel) {
        const int64_t block = index / walk->block_numel, rounds = block / walk->parts;
        walk->end = (block + 1) * walk->block_numel;
        walk->owner = block - rounds * walk->parts;
        walk->before = (block - rounds) * walk->block_numel;
    }
    while (index >= walk->end) {
        walk->end += walk->block_numel;
        /* in a new round there is one block more before it, but that one is of its own part */
        if (++walk->owner == walk->parts)
            walk->owner = 0;
        else
            walk->before += walk->block_numel;
    }
}

static Walk walk_from_start(int64_t block_numel, int64_t parts)
{
    return (Walk){.block_numel = block_numel, .parts = parts, .end = block_numel};
}

void topq_split_indices(const int64_t *restrict indices, int64_t count, int64_t block_numel,
                        int64_t *restrict edges, int64_t parts, int64_t *restrict mine,
                        int64_t *restrict places)
{
    Walk walk = walk_from_start(block_numel, parts);
    for (int64_t at = 0; at < count;) {
        const int64_t first = at;
        walk_to(&walk, indices[at]);
        while (++at < count && indices[at] < walk.end)
            ;
        edges[walk.owner + 1] += at - first;
    }
    for (int64_t part = 0; part < parts; part++)
        edges[part + 1] += edges[part];
    /* each start moves on to its end, which is where the next part starts */
    walk = walk_from_start(block_numel, parts);
    for (int64_t at = 0; at < count;) {
        walk_to(&walk, indices[at]);
        int64_t entry = edges[walk.owner];
        do {
            mine[entry] = at;
            places[entry++] = indices[at] - walk.before;
        } while (++at < count && indices[at] < walk.end);
        edges[walk.owner] = entry;
    }
    for (int64_t part = parts; part > 0; part--)
        edges[part] = edges[part - 1];
    edges[0] = 0;
}

void topq_indices_of_part(const int64_t *restrict places, int64_t count, int64_t block_numel,
                          int64_t parts, int64_t part, int64_t *restrict indices)
{
    int64_t end = block_numel, before = part * block_numel;
    for (int64_t at = 0; at < count;) {
        if (places[at] >= end) {
            const int64_t rounds = (places[at] - end) / block_numel + 1;
            end += rounds * block_numel;
            before += rounds * (parts - 1) * block_numel;
        }
        do
            indices[at] = places[at] + before;
        while (++at < count && places[at] < end);
    }
}
