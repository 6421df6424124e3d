/* The contract of the compiled kernels: loops over whole gradients, at the speed of memory.
 *
 * Types. `width` is the bytes of an element of those vectors that are `void *`: 2, 4 or 8 of bit
 * patterns (integers), 4 or 8 of numbers (float, double). Counts, sizes and indices are int64_t and
 * count elements unless a name says bytes or bits. Vectors are contiguous, and aligned to their
 * element; none may be NULL where its size is not 0, but where it says so.
 *
 * Aliasing. No vector that is written shares memory with another of the call.
 *
 * Threads. No kernel keeps anything between calls, allocates or locks: any number may run at once
 * on vectors that do not overlap. They are called without Python's lock.
 *
 * Bounds. Callers check sizes. Kernels marked WIRE take what came from elsewhere: they check
 * whatever of it decides where to read or write, and touch nothing outside their vectors.
 *
 * Numbers are rounded to nearest, ties to even, once an operation, in the order that is given:
 * results are the same to the bit on every machine. Where a sum is NaN, its sign and payload are
 * not.
 *
 * Returns TOPQ_UNKNOWN for a width that the kernel is not there for.
 */
#ifndef TOPQ_KERNELS_H
#define TOPQ_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define TOPQ_API __declspec(dllexport)
#else
#define TOPQ_API __attribute__((visibility("default")))
#endif

/* Grows by one with every change of an argument list: Python and the library must agree. */
#define TOPQ_ABI 3
TOPQ_API int64_t topq_abi(void);

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

#define TOPQ_UNKNOWN (-9)
/* what is wrong with bytes from elsewhere */
#define TOPQ_RANGE (-2)
#define TOPQ_PADDING (-3)
#define TOPQ_NOT_FINITE (-4)
/* Elements that are looked at together: lists need room for as many more than they are to hold. */
#define TOPQ_LANES 64
/* What divides the address of memory that is written past the caches. */
#define TOPQ_STREAM_ALIGNMENT 64
/* A line of nearly every machine's caches. */
#define LINE_BYTES 64

/* ---- select_accumulate.c -------------------------------------------------------------------- */

/* List where the keys of vector + residual, or of a vector of patterns where residual is NULL,
 * reach `low`.
 *
 * A key are an element's bits without the sign, as an integer. Goes on behind the `found` entries
 * that indices and numbers hold, and returns how many they hold then; lists no more where fewer
 * than TOPQ_LANES of `room` are free.
 *
 *   vector    (numel,)
 *   residual  NULL, or (numel,); where before is given, residual += vector for all elements
 *   begin     what indices count from
 *   indices   (room,), ascending
 *   numbers   (room,), the elements there
 *   before    NULL, or (numel,) at TOPQ_STREAM_ALIGNMENT: becomes what residual was
 *   added     (1,), with before: grows by numel at the end
 */
TOPQ_API int64_t topq_find_reaching(int64_t width, const void *vector, void *residual,
                                    int64_t numel, int64_t low, int64_t begin, int64_t *indices,
                                    void *numbers, int64_t room, int64_t found, void *before,
                                    int64_t *added);

/* Keep the k entries of largest magnitude, the first ones of those that tie at the k-th place.
 *
 *   indices  (count,); bits (count,), patterns; 1 <= k <= count
 *   near     (count,), scratch
 *   top      (k + 1,), the indices of those, in their order; top_bits (k + 1,), their patterns
 *   outcome  (2,), becomes the k-th and the highest key
 */
TOPQ_API int64_t topq_keep_largest(int64_t width, const int64_t *indices, const void *bits,
                                   int64_t count, int64_t k, void *near, int64_t *top,
                                   void *top_bits, int64_t *outcome);

/* Do both for every segment of vector + residual, or of patterns where residual is NULL.
 *
 *   plan      (segments, 4): start, stop, k, and how many candidates are worth having
 *   lows      (segments,), integers of the same width: the keys that candidates reach
 *   indices, numbers, near: scratch (room,), the room being at least
 *             min(worth having, stop - start) + 1 + TOPQ_LANES of each segment
 *   top       (sum of k, + 1), counted from begin; top_bits as long
 *   outcomes  (segments, 3): how many reach, the k-th key, the highest. Where fewer than k reach,
 * or more than are worth having, the last two and the k places are left as they are.
 */
TOPQ_API int64_t topq_select_segments(int64_t width, const void *vector, const void *residual,
                                      int64_t begin, const int64_t *plan, int64_t segments,
                                      const void *lows, int64_t *indices, void *numbers, void *near,
                                      int64_t *top, void *top_bits, int64_t *outcomes);

/* List where patterns (numel,) differ; return how many, or -1 where they are more than `room`. */
TOPQ_API int64_t topq_find_differing(int64_t width, const void *ours, const void *theirs,
                                     int64_t numel, int64_t *indices, int64_t room);

/* ---- residual_average.c --------------------------------------------------------------------- */

/* residual += gradient, then residual[indices - begin] = rest.
 *
 *   residual, gradient  (numel,), gradient written only with replace
 *   indices, rest       (count,), indices ascending
 *   replace             not 0: then gradient = 0, and gradient[terms - begin] += summands, of each
 *                       list the terms from next_term to ends, which ascend
 *   terms, summands     (lists,), pointers to as many of each list as ends says, or more
 *   next_term, ends     (lists,), next_term moves on as terms are added
 *
 * Returns 1, or 0 where an index or a term is out of order, or not in [begin, begin + numel):
 * nothing is written for it. WIRE.
 */
TOPQ_API int64_t topq_update_residual_span(int64_t width, void *residual, void *gradient,
                                           int64_t numel, int64_t begin, const int64_t *indices,
                                           const void *rest, int64_t count, int64_t replace,
                                           const int64_t *const *terms,
                                           const void *const *summands, int64_t *next_term,
                                           const int64_t *ends, int64_t lists);

/* List where the sum of sparse vectors of `numel` elements is not zero, and its bits there.
 *
 * Terms and so on are as for topq_update_residual_span. window is scratch (window_numel,), at least
 * 1; indices and numbers are (room,), with room for all terms and TOPQ_LANES more. Returns how many
 * they hold, or -1 where a term is out of range, or comes after that of a later window. WIRE.
 */
TOPQ_API int64_t topq_sum_terms(int64_t width, const int64_t *const *terms,
                                const void *const *summands, int64_t *next_term,
                                const int64_t *ends, int64_t lists, int64_t numel, void *window,
                                int64_t window_numel, int64_t *indices, void *numbers,
                                int64_t room);

/* out[indices] += values, one after the other, both (count,), out (numel,). Returns 1, or 0 at the
 * first index that is out of range. WIRE. */
TOPQ_API int64_t topq_scatter_add(int64_t width, void *out, int64_t numel, const int64_t *indices,
                                  const void *values, int64_t count);

/* ---- index_coding.c: gaps are integers of a width of 4 or 8 --------------------------------- */

/* Write how many positions are skipped before each index; return 0 unless they ascend in
 * [0, numel), else 1. indices and gaps are (count,). WIRE. */
TOPQ_API int64_t topq_gaps_between(int64_t width, const int64_t *indices, int64_t count,
                                   int64_t numel, void *gaps);

/* sums[i] = the sum of gaps >> bits + i; gaps are (count,), none negative, sums (numbers,), and
 * every shift in [0, 8 * width). */
TOPQ_API int64_t topq_sums_of_quotients(int64_t width, const void *gaps, int64_t count,
                                        int64_t bits, int64_t *sums, int64_t numbers);

/* Write gaps in Rice code: quotients in unary (zeros, then a one, from the lowest bit on), then of
 * the rest whole low bytes, a plane each, and what is left over packed in fields of bits % 8.
 *
 *   gaps, bits  as above
 *   unary       ((count + sum_of_quotients + 7) / 8,), zeros before
 *   planes      (bits / 8, count)
 *   fields      ((count * (bits % 8) + 7) / 8,)
 */
TOPQ_API int64_t topq_write_gaps(int64_t width, const void *gaps, int64_t count, int64_t bits,
                                 uint8_t *unary, uint8_t *planes, uint8_t *fields);

/* Undo topq_write_gaps.
 *
 *   unary    (unary_bytes,); planes (planes_bytes,) and fields (fields_bytes,) at least as long as
 *            `count` codes take
 *   indices  (count,), ascending
 *   outcome  (2,): how many codes there are, count + 1 for all that are more, and the last one's
 *            bit, -1 where there is none
 *
 * Returns 0, TOPQ_RANGE where an index is above 2**56 or a stream too short, TOPQ_UNKNOWN unless
 * bits is in [0, 55]. WIRE.
 */
TOPQ_API int64_t topq_read_gaps(const uint8_t *unary, int64_t unary_bytes, const uint8_t *planes,
                                int64_t planes_bytes, const uint8_t *fields, int64_t fields_bytes,
                                int64_t bits, int64_t *indices, int64_t count, int64_t *outcome);

/* ---- half_lowbit.c -------------------------------------------------------------------------- */

/* scaled = numbers * scale, and halves = its bits in fp16, ties to even; the products are below
 * 65520 in magnitude. All are (count,). */
TOPQ_API void topq_round_to_half(const float *numbers, int64_t count, float scale, float *scaled,
                                 uint16_t *halves);

/* widened = fp32(halves) * scale, both (count,); returns 0 where one is not finite, else 1. */
TOPQ_API int64_t topq_widen_half(const uint16_t *halves, int64_t count, float scale,
                                 float *widened);

/* high and low = the bytes of halves, all (count,); rotated: of the halves turned left by one bit. */
TOPQ_API void topq_split_halves(const uint16_t *halves, int64_t count, int64_t rotated,
                                uint8_t *high, uint8_t *low);

/* Undo topq_split_halves. */
TOPQ_API void topq_join_halves(const uint8_t *high, const uint8_t *low, int64_t count,
                               int64_t rotated, uint16_t *halves);

/* Write values in blocks of up to 128, which begin anew with each segment, of 2, 4 or 8 code_bits;
 * lowbit.py says what they look like.
 *
 *   values   (the sum of ks,), finite
 *   ks       (segments,), none below zero
 *   scales   (4 * blocks,): base and step of each in bf16
 *   packed   ((the sum of ks * code_bits + 7) / 8,): signs and levels
 *   decoded  (the sum of ks,), what topq_decode_blocks makes of it
 */
TOPQ_API int64_t topq_encode_blocks(const float *values, const int64_t *ks, int64_t segments,
                                    int64_t code_bits, uint8_t *scales, uint8_t *packed,
                                    float *decoded);

/* Undo topq_encode_blocks, of a payload of scales and then packed, into values (count,).
 *
 * Returns 0, or TOPQ_RANGE where ks do not add up to count or payload_bytes is not what they take,
 * TOPQ_PADDING where bits at the end are not zero, TOPQ_NOT_FINITE where a value is not. WIRE.
 */
TOPQ_API int64_t topq_decode_blocks(const uint8_t *payload, int64_t payload_bytes,
                                    const int64_t *ks, int64_t segments, int64_t code_bits,
                                    float *values, int64_t count);

/* ---- coded_levels.c ------------------------------------------------------------------------- */

/* Write values as signs and levels of blocks of up to 4096, which begin anew with each segment;
 * coded.py says what they look like.
 *
 *   values   (the sum of ks,), finite
 *   ks       (segments,), none below zero
 *   ratio    a step over the mean excess of a block's magnitudes over the least of them
 *   bases    (2 * blocks,), in bf16; steps (2 * blocks of two values or more,)
 *   signs    ((the sum of ks + 7) / 8,)
 *   levels, decoded  (the sum of ks,), decoded being what topq_decode_levels makes of it
 */
TOPQ_API int64_t topq_encode_levels(const float *values, const int64_t *ks, int64_t segments,
                                    double ratio, uint8_t *bases, uint8_t *steps, uint8_t *signs,
                                    uint8_t *levels, float *decoded);

/* Undo topq_encode_levels, scales being bases and then steps, into values (count,).
 *
 * Returns 0, or TOPQ_RANGE where ks do not add up to count or are not of these scale_bytes and
 * sign_bytes, TOPQ_PADDING where bits at the end are not zero, TOPQ_NOT_FINITE where a value is
 * not. WIRE, but for levels (count,).
 */
TOPQ_API int64_t topq_decode_levels(const uint8_t *scales, int64_t scale_bytes,
                                    const uint8_t *signs, int64_t sign_bytes, const uint8_t *levels,
                                    const int64_t *ks, int64_t segments, float *values,
                                    int64_t count);

/* ---- symbol_coding.c ------------------------------------------------------------------------ */

/* Write numbers of a byte in the bits that their frequencies leave them; symbols.py says how.
 *
 *   levels   (count,)
 *   scratch  (count,)
 *   payload  room for the bytes that symbols.py's most_bytes says
 *
 * Returns how many bytes it took.
 */
TOPQ_API int64_t topq_write_symbols(const uint8_t *levels, int64_t count, uint8_t *scratch,
                                    uint8_t *payload);

/* Undo topq_write_symbols, of a payload of just these bytes, into levels (count,).
 *
 * Returns 0, or TOPQ_RANGE or TOPQ_PADDING for what topq_write_symbols does not write. WIRE.
 */
TOPQ_API int64_t topq_read_symbols(const uint8_t *payload, int64_t payload_bytes, uint8_t *levels,
                                   int64_t count);

/* ---- half_lowbit.c, goes on ----------------------------------------------------------------- */

/* Clip the values of each row to `bound` times their mean magnitude, a limit rounded so that value
 * - bounded is exact; rows of which half or more is there stay as they are.
 *
 *   values, bounded  (the sum of ks,), finite
 *   ks, row_numels   (rows,): how many values a row has here, and how many in all
 */
TOPQ_API int64_t topq_bound_rows(int64_t width, const void *values, const int64_t *ks,
                                 const int64_t *row_numels, int64_t rows, double bound,
                                 void *bounded);

/* ---- partition.c ---------------------------------------------------------------------------- */

/* Sort indices by the part that their block of block_numel belongs to, in turn.
 *
 *   indices       (count,), ascending, none negative
 *   edges         (parts + 1,), zeros before: part p's lie from edges[p] to edges[p + 1]
 *   mine, places  (count,): where they are in `indices`, and where in the part
 */
TOPQ_API void topq_split_indices(const int64_t *indices, int64_t count, int64_t block_numel,
                                 int64_t *edges, int64_t parts, int64_t *mine, int64_t *places);

/* Write the indices in the vector of these places in one of `parts` parts, both (count,), the places
 * ascending. */
TOPQ_API void topq_indices_of_part(const int64_t *places, int64_t count, int64_t block_numel,
                                   int64_t parts, int64_t part, int64_t *indices);

/* ---- tensor_list.c -------------------------------------------------------------------------- */

/* Copy tensors one behind the other into flat.
 *
 *   addresses    (tensors,), of contiguous memory
 *   edges_bytes  (tensors + 1,), ascending from 0: where in flat each starts, and the last one ends
 */
TOPQ_API void topq_gather_tensors(const int64_t *addresses, const int64_t *edges_bytes,
                                  int64_t tensors, uint8_t *flat);

/* Copy what lies at ascending indices (count,) of flat to the same places of the tensors. edges are
 * as above, but count elements. Returns 1, or 0 at the first index that is out of order or range.
 * WIRE. */
TOPQ_API int64_t topq_scatter_to_tensors(int64_t width, const int64_t *addresses,
                                         const int64_t *edges, int64_t tensors, const void *flat,
                                         const int64_t *indices, int64_t count);

#endif
