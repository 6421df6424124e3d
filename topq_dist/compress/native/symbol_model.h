/* What a symbol is and how likely: the weights that travel, and the frequencies that follow. */
#ifndef TOPQ_SYMBOL_MODEL_H
#define TOPQ_SYMBOL_MODEL_H

#include "topq_kernels.h"

#include <string.h>

/* Symbols' frequencies add up to 1 << SCALE_BITS; lanes hold numbers from LOWEST to 2**32 - 1, and
 * words of 16 bits travel between them and the stream. */
enum { SCALE_BITS = 15, SCALE = 1 << SCALE_BITS, LOWEST = 1 << 16, MOST_LANES = 16 };
enum { LEVELS = 256, SYMBOLS = 256, MOST_DIGITS = 8 };

/* A symbol is a byte of fields of 1, 2, 4 or 8 bits, from the lowest on; a field is a level's place
 * among those that are present. */
typedef struct {
    uint32_t frequency, below;
} Symbol;

typedef struct {
    int present, width, digits;
    uint8_t level[LEVELS];
    Symbol symbols[SYMBOLS];
} Model;

static int width_for(int present)
{
    return present <= 2 ? 1 : present <= 4 ? 2 : present <= 16 ? 4 : 8;
}

/* Weights are counts cut to their four highest bits: three of them, and the place of the first. */
static uint8_t weight_code(uint64_t count)
{
    int shift = 0;
    while (count >> shift > 15)
        shift++;
    return (uint8_t)(count >> shift > 7 ? (shift + 1) * 8 + (int)(count >> shift) - 8
                                        : (int)count);
}

static uint64_t weight_of(uint8_t code)
{
    return code < 8 ? code : (uint64_t)(8 + code % 8) << (code / 8 - 1);
}

/* Return 0, or TOPQ_RANGE where there is no number but those of weight 0. */
static int64_t make_model(const uint8_t *codes, int levels, Model *model)
{
    uint64_t total = 0, share[LEVELS], chance[SYMBOLS] = {0}, sum = 0;
    model->present = 0;
    for (int level = 0; level < levels; level++)
        if (codes[level] != 0) {
            model->level[model->present++] = (uint8_t)level;
            total += weight_of(codes[level]);
        }
    if (model->present == 0)
        return TOPQ_RANGE;
    for (int at = 0; at < model->present; at++) {
        share[at] = (weight_of(codes[model->level[at]]) << 16) / total;
        share[at] += share[at] == 0;
    }
    model->width = width_for(model->present);
    model->digits = 8 / model->width;
    chance[0] = (uint64_t)1 << 40;
    for (int bits = 0; bits < 8; bits += model->width)
        /* from the highest field down, so that what is read has not been written yet */
        for (int at = model->present - 1; at >= 0; at--)
            for (int symbol = 0; symbol < 1 << bits; symbol++)
                chance[at << bits | symbol] = chance[symbol] * share[at] >> 16;
    int likeliest = 0, possible = 1;
    for (int digit = 0; digit < model->digits; digit++)
        possible *= model->present;
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        sum += chance[symbol];
        likeliest = chance[symbol] > chance[likeliest] ? symbol : likeliest;
    }
    uint32_t below = 0, spare = SCALE;
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        const uint64_t room = (uint64_t)(SCALE - possible);
        int is_possible = 1;
        for (int bits = 0; bits < 8; bits += model->width)
            is_possible &= (symbol >> bits & ((1 << model->width) - 1)) < model->present;
        model->symbols[symbol].frequency =
            is_possible ? 1 + (uint32_t)(chance[symbol] * room / sum) : 0;
        spare -= model->symbols[symbol].frequency;
    }
    model->symbols[likeliest].frequency += spare;
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        model->symbols[symbol].below = below;
        below += model->symbols[symbol].frequency;
    }
    return 0;
}

/* The highest number there is, and the weights of all up to it, runs of none as 0 and their length;
 * return how many bytes they take. */
static int64_t write_weights(const uint64_t *counts, uint8_t *codes, int *levels, uint8_t *out)
{
    const uint8_t *const start = out;
    *levels = LEVELS;
    while (counts[*levels - 1] == 0)
        --*levels;
    *out++ = (uint8_t)(*levels - 1);
    for (int level = 0; level < *levels;) {
        const int from = level;
        for (; counts[level] == 0; level++)
            codes[level] = 0;
        if (level > from) {
            *out++ = 0;
            *out++ = (uint8_t)(level - from);
        }
        codes[level] = weight_code(counts[level]);
        *out++ = codes[level++];
    }
    return out - start;
}

/* Undo write_weights; return how many bytes it read, or TOPQ_RANGE. */
static int64_t read_weights(const uint8_t *payload, int64_t payload_bytes, uint8_t *codes,
                            int *levels)
{
    int64_t at = 0;
    if (payload_bytes < 2)
        return TOPQ_RANGE;
    *levels = payload[at++] + 1;
    for (int level = 0; level < *levels;) {
        if (at >= payload_bytes)
            return TOPQ_RANGE;
        codes[level] = payload[at++];
        if (codes[level++] != 0)
            continue;
        /* neither the last one nor a run beside another */
        if (at >= payload_bytes || payload[at] == 0 || level - 1 + payload[at] >= *levels)
            return TOPQ_RANGE;
        const int run = payload[at++];
        memset(codes + level - 1, 0, (size_t)run);
        level += run - 1;
        if (at >= payload_bytes || payload[at] == 0)
            return TOPQ_RANGE;
    }
    return at;
}

#endif
