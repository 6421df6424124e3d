/* Feeds damaged frames to every kernel that reads what came over a wire.
 *
 *     fuzz_driver COUNT SEED < frames
 *
 * stdin holds frames as they are sent, each behind its length (uint32). COUNT times one of them is
 * damaged and taken apart as topq_dist does it, but without Python's checks: whatever lengths and
 * indices come out go to the kernels, with memory of just the sizes that their header asks for, so
 * that a sanitizer sees every step outside. Prints how many frames each kernel took.
 */
#include "topq_kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HEADER = 32, MOST_K = 1 << 15, MOST_NUMEL = 1 << 12, MOST_FRAMES = 1024, ROUNDS = 12 };
enum { FP16 = 1, INT8 = 3, INT2 = 5, EC1 = 7, EC2 = 8, ECFP16 = 9, RAW = 1, RICE = 3 };
enum { SEGMENTED = 2 };

static uint64_t state;

static uint64_t drawn(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? state % below : 0;
}

static void *room_for(int64_t bytes)
{
    void *room = malloc(bytes > 0 ? (size_t)bytes : 1);
    if (room == NULL)
        exit(3);
    return room;
}

static void *copy_of(const uint8_t *from, int64_t bytes)
{
    void *copy = room_for(bytes);
    memcpy(copy, from, (size_t)(bytes > 0 ? bytes : 0));
    return copy;
}

static uint64_t field(const uint8_t *frame, int at, int bytes)
{
    uint64_t number = 0;
    memcpy(&number, frame + at, (size_t)bytes);
    return number;
}

static void damage(uint8_t *frame, int64_t *length)
{
    static const uint8_t telling[] = {0, 1, 2, 127, 128, 254, 255};
    for (uint64_t left = 1 + drawn(ROUNDS); left > 0; left--) {
        /* half of it where lengths and counts are */
        const int64_t at = (int64_t)drawn(drawn(2) ? (uint64_t)*length : HEADER + 12);
        if (at >= *length)
            continue;
        switch (drawn(5)) {
        case 0:
            frame[at] ^= (uint8_t)(1u << drawn(8));
            break;
        case 1:
            frame[at] = telling[drawn(sizeof telling)];
            break;
        case 2:
            frame[at] = (uint8_t)drawn(256);
            break;
        case 3:
            memset(frame + at, telling[drawn(sizeof telling)],
                   drawn((uint64_t)(*length - at)) % 64);
            break;
        default:
            if (*length - at > HEADER)
                *length -= at;
        }
    }
}

/* Everything that adds up at these indices, wherever they point. */
static void add_up(int64_t *indices, float *values, int64_t k, int64_t numel)
{
    const int64_t begin = (int64_t)drawn(3) - 1;
    /* of any length: a kernel that reads behind the last, shorter block of one must be seen */
    const int64_t window_numel = 1 + (int64_t)drawn(3 * TOPQ_LANES);
    float *out = room_for(4 * numel), *gradient = room_for(4 * numel);
    float *window = room_for(4 * window_numel);
    memset(out, 0, (size_t)(4 * numel));
    memset(gradient, 0, (size_t)(4 * numel));
    topq_scatter_add(4, out, numel, indices, values, k);
    const int64_t *terms[2] = {indices, indices + k / 2};
    const void *summands[2] = {values, values + k / 2};
    int64_t next_term[2] = {0, 0}, ends[2] = {k / 2, k - k / 2};
    topq_update_residual_span(4, out, gradient, numel, begin, indices, values, k, 1, terms,
                              summands, next_term, ends, 2);
    int64_t *listed = room_for(8 * (k + TOPQ_LANES)), first[2] = {0, 0};
    float *sums = room_for(4 * (k + TOPQ_LANES));
    topq_sum_terms(4, terms, summands, first, ends, 2, numel, window, window_numel, listed, sums,
                   k + TOPQ_LANES);
    int32_t *gaps = room_for(4 * k);
    topq_gaps_between(4, indices, k, numel, gaps);
    free(out);
    free(gradient);
    free(window);
    free(listed);
    free(sums);
    free(gaps);
}

static int64_t segments_of(const uint8_t *listed, int64_t bytes, int64_t *ks)
{
    int64_t count = 0, at = 0;
    while (at < bytes) {
        uint64_t k = 0;
        for (int shift = 0; at < bytes; shift += 7) {
            k |= shift < 64 ? (uint64_t)(listed[at] & 127) << shift : 0;
            if (listed[at++] < 128)
                break;
        }
        ks[count++] = (int64_t)k;
    }
    return count;
}

/* Return the levels of a payload, which are not all written where it is refused. */
static uint8_t *take_symbols(const uint8_t *code, int64_t code_bytes, int64_t k, uint64_t *taken)
{
    uint8_t *levels = room_for(k), *payload = copy_of(code, code_bytes);
    memset(levels, 1, (size_t)k);
    taken[3] += 0 == topq_read_symbols(payload, code_bytes, levels, k);
    free(payload);
    return levels;
}

static void take_levels(const uint8_t *payload, int64_t payload_bytes, const int64_t *ks,
                        int64_t segments, float *values, int64_t k, uint64_t *taken)
{
    int64_t scale_bytes = 0;
    for (int64_t segment = 0; segment < segments; segment++) {
        const uint64_t of_segment = (uint64_t)ks[segment] % MOST_K;
        scale_bytes += 4 * (int64_t)(of_segment / 4096) + 2 * (of_segment % 4096 > 0) +
                       2 * (of_segment % 4096 > 1);
    }
    scale_bytes += drawn(9) ? 0 : (int64_t)drawn(9) - 4;
    scale_bytes = scale_bytes < 0 ? 0 : scale_bytes < payload_bytes ? scale_bytes : payload_bytes;
    int64_t sign_bytes = (k + 7) / 8 + (drawn(9) ? 0 : 1), rest = payload_bytes - scale_bytes;
    sign_bytes = sign_bytes < rest ? sign_bytes : rest;
    uint8_t *scales = copy_of(payload, scale_bytes);
    uint8_t *signs = copy_of(payload + scale_bytes, sign_bytes);
    uint8_t *levels =
        take_symbols(payload + scale_bytes + sign_bytes, rest - sign_bytes, k, taken);
    taken[4] += 0 == topq_decode_levels(scales, scale_bytes, signs, sign_bytes, levels, ks,
                                        segments, values, k);
    free(scales);
    free(signs);
    free(levels);
}

static void decode(const uint8_t *frame, int64_t length, uint64_t *taken)
{
    const int format = frame[6], coding = frame[7], rice_bits = frame[8];
    const int64_t numel = (int64_t)(field(frame, 16, 8) % MOST_NUMEL);
    const int64_t k = (int64_t)(field(frame, 24, 4) % MOST_K);
    int64_t start = HEADER + (frame[5] == SEGMENTED ? 8 : 0) + (format >= EC1 ? 4 : 0);
    start = start < length ? start : length;
    int64_t index_bytes = (int64_t)field(frame, 12, 4), listed_bytes = 0;
    index_bytes = index_bytes < length - start ? index_bytes : length - start;
    int64_t *indices = room_for(8 * k), outcome[2];
    for (int64_t at = 0; at < k; at++)
        indices[at] = (int64_t)drawn(4) - 1 + at;
    const uint8_t *index = frame + start;
    if (coding == RICE) {
        const int64_t low_bytes = k * (rice_bits / 8) + (k * (rice_bits % 8) + 7) / 8;
        const int64_t wanted = index_bytes - (int64_t)(drawn(8) ? low_bytes : drawn(99));
        const int64_t unary_bytes = wanted < 0 ? 0 : wanted;
        const int64_t rest = index_bytes - unary_bytes, whole = k * (rice_bits / 8);
        const int64_t planes_bytes = whole < rest ? whole : rest;
        uint8_t *unary = copy_of(index, unary_bytes);
        uint8_t *planes = copy_of(index + unary_bytes, planes_bytes);
        uint8_t *fields = copy_of(index + unary_bytes + planes_bytes, rest - planes_bytes);
        taken[0] += 0 == topq_read_gaps(unary, unary_bytes, planes, planes_bytes, fields,
                                        rest - planes_bytes, rice_bits, indices, k, outcome);
        free(unary);
        free(planes);
        free(fields);
    } else if (coding == RAW) {
        for (int64_t at = 0; at < k && 4 * at + 4 <= index_bytes; at++)
            indices[at] = (int32_t)field(index + 4 * at, 0, 4);
    }
    start += index_bytes;
    if (frame[5] == SEGMENTED && length >= HEADER + 8) {
        listed_bytes = (int64_t)field(frame, HEADER, 4);
        listed_bytes = listed_bytes < length - start ? listed_bytes : length - start;
    }
    float *values = room_for(4 * k);
    for (int64_t at = 0; at < k; at++)
        values[at] = (float)at;
    int64_t *ks = room_for(8 * (listed_bytes + 1)), segments = 1;
    ks[0] = k;
    if (listed_bytes > 0)
        segments = segments_of(frame + start, listed_bytes, ks);
    start += listed_bytes;
    if (format >= INT8 && format <= INT2) {
        uint8_t *payload = copy_of(frame + start, length - start);
        taken[1] += 0 == topq_decode_blocks(payload, length - start, ks, segments,
                                            8 >> (format - INT8), values, k);
        free(payload);
    } else if (format == EC1 || format == EC2) {
        take_levels(frame + start, length - start, ks, segments, values, k, taken);
    } else if (format >= ECFP16) {
        const int64_t plain = k < length - start ? k : length - start;
        uint8_t *high = take_symbols(frame + start + plain, length - start - plain, k, taken);
        uint8_t *low = copy_of(frame + start, plain);
        uint16_t *halves = room_for(2 * plain);
        topq_join_halves(high, low, plain, format > ECFP16, halves);
        free(high);
        free(low);
        free(halves);
    } else if (format == FP16) {
        const int64_t halves = (length - start) / 2 < k ? (length - start) / 2 : k;
        uint16_t *payload = copy_of(frame + start, 2 * halves);
        taken[2] += 1 == topq_widen_half(payload, halves, 0.5f, values);
        free(payload);
    }
    add_up(indices, values, k, numel);
    free(indices);
    free(values);
    free(ks);
}

int main(int count, char **words)
{
    static uint8_t *frames[MOST_FRAMES];
    static int64_t lengths[MOST_FRAMES];
    int64_t held = 0;
    uint32_t length;
    uint64_t taken[5] = {0};
    if (count != 3)
        return 2;
    const uint64_t wanted = strtoull(words[1], NULL, 10);
    state = strtoull(words[2], NULL, 10) * 2 + 1;
    while (held < MOST_FRAMES && fread(&length, sizeof length, 1, stdin) == 1) {
        frames[held] = room_for(length);
        lengths[held] = length;
        if (length < HEADER + 12 || fread(frames[held++], 1, length, stdin) != length)
            return 2;
    }
    for (uint64_t at = 0; held > 0 && at < wanted; at++) {
        const int64_t one = (int64_t)drawn((uint64_t)held);
        uint8_t *frame = copy_of(frames[one], lengths[one]);
        int64_t left = lengths[one];
        if (drawn(16))
            damage(frame, &left);
        decode(frame, left, taken);
        free(frame);
    }
    for (int64_t at = 0; at < held; at++)
        free(frames[at]);
    printf("%llu frames; taken as Rice code: %llu, as levels: %llu, as fp16: %llu, as symbols: %llu, "
           "as coded levels: %llu\n",
           (unsigned long long)wanted, (unsigned long long)taken[0], (unsigned long long)taken[1],
           (unsigned long long)taken[2], (unsigned long long)taken[3],
           (unsigned long long)taken[4]);
    return 0;
}
