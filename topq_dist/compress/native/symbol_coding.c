/* Entropy coding of small numbers: range asymmetric numeral systems (Duda, arXiv:1311.2540), in
 * interleaved lanes (Giesen, arXiv:1402.3392), several numbers to a symbol. */
#include "symbol_model.h"

/* how many levels are looked at before it is known that they are not near each other */
enum { CHUNK = 4096 };

static int lanes_for(int64_t symbols)
{
    return symbols < 2048 ? 1 : symbols < 16384 ? 4 : MOST_LANES;
}

static void count_bytes(const uint8_t *bytes, int64_t count, uint64_t *counts)
{
    /* of their own for neighbours, which are often the same */
    uint32_t apart[4][LEVELS];
    memset(counts, 0, LEVELS * sizeof *counts);
    for (int64_t at = 0; at < count;) {
        const int64_t stop = count - at < (1 << 30) ? count : at + (1 << 30);
        memset(apart, 0, sizeof apart);
        for (; at + 4 <= stop; at += 4)
            for (int lane = 0; lane < 4; lane++)
                apart[lane][bytes[at + lane]]++;
        for (; at < stop; at++)
            apart[0][bytes[at]]++;
        for (int level = 0; level < LEVELS; level++)
            counts[level] += (uint64_t)apart[0][level] + apart[1][level] + apart[2][level] +
                             apart[3][level];
    }
}

/* Write numbers less `least`, each in `width` bits; fields at the end that nothing is left for are
 * 0. */
static void pack_fields(const uint8_t *numbers, int64_t count, uint8_t least, int width,
                        uint8_t *symbols)
{
    const int digits = 8 / width;
    const int64_t whole = count / digits;
    /* none of its bytes borrows from another */
    const uint64_t lowest = least * UINT64_C(0x0101010101010101);
    for (int64_t at = 0; at < whole; at++) {
        if (width == 1) {
            uint64_t fields;
            memcpy(&fields, numbers + 8 * at, sizeof fields);
            fields -= lowest;
            fields |= fields >> 7;
            fields |= fields >> 14;
            symbols[at] = (uint8_t)(fields | fields >> 28);
        } else if (width == 2) {
            uint32_t fields;
            memcpy(&fields, numbers + 4 * at, sizeof fields);
            fields -= (uint32_t)lowest;
            fields |= fields >> 6;
            symbols[at] = (uint8_t)(fields | fields >> 12);
        } else {
            uint16_t fields;
            memcpy(&fields, numbers + 2 * at, sizeof fields);
            fields = (uint16_t)(fields - (uint16_t)lowest);
            symbols[at] = (uint8_t)(fields | fields >> 4);
        }
    }
    if (whole * digits < count) {
        uint32_t symbol = 0;
        for (int64_t digit = 0; whole * digits + digit < count; digit++)
            symbol |= (uint32_t)(numbers[whole * digits + digit] - least) << digit * width;
        symbols[whole] = (uint8_t)symbol;
    }
}

/* As pack_fields does it, but of two numbers their places. */
static void pack_pairs_of_places(const uint8_t *numbers, int64_t count, const uint8_t *place,
                                 uint8_t *symbols)
{
    for (int64_t at = 0; at < count / 2; at++) {
        uint16_t pair;
        memcpy(&pair, numbers + 2 * at, sizeof pair);
        symbols[at] = (uint8_t)(place[pair & 255] | place[pair >> 8] << 4);
    }
    if (count % 2)
        symbols[count / 2] = place[numbers[count - 1]];
}

/* Count the fields of symbols, which stand for levels from `least` on. */
static void count_fields(const uint8_t *symbols, int64_t count, uint8_t least, int width,
                         uint64_t *counts)
{
    uint64_t of_symbols[SYMBOLS];
    const int digits = 8 / width;
    count_bytes(symbols, (count + digits - 1) / digits, of_symbols);
    memset(counts, 0, LEVELS * sizeof *counts);
    for (int symbol = 0; symbol < SYMBOLS; symbol++)
        /* fields of symbols that are not there may stand for levels past the last */
        for (int bits = 0; of_symbols[symbol] != 0 && bits < 8; bits += width)
            counts[least + (symbol >> bits & ((1 << width) - 1))] += of_symbols[symbol];
    counts[least] -= (uint64_t)((digits - count % digits) % digits);
}

/* Count levels; return all as symbols, one field for each that is present, in `room`. Where they are
 * near each other and none is missing between, symbols are counted, as they are fewer. Where they
 * are many, the levels themselves are returned. */
static const uint8_t *spell(const uint8_t *levels, int64_t count, uint8_t *room, uint64_t *counts)
{
    uint8_t least = levels[0], top = levels[0], place[LEVELS];
    for (int64_t at = 0; at < count && width_for(top - least + 1) < 8;) {
        const int64_t stop = count - at < CHUNK ? count : at + CHUNK;
        for (; at < stop; at++) {
            least = levels[at] < least ? levels[at] : least;
            top = levels[at] > top ? levels[at] : top;
        }
    }
    const int width = width_for(top - least + 1);
    int present = 0;
    if (width < 8) {
        pack_fields(levels, count, least, width, room);
        count_fields(room, count, least, width, counts);
    } else
        count_bytes(levels, count, counts);
    for (int level = 0; level < LEVELS; level++) {
        place[level] = (uint8_t)present;
        present += counts[level] != 0;
    }
    const int needed = width_for(present);
    if (needed == 8)
        return levels;
    if (width < 8 && present == top - least + 1)
        return room;
    if (needed == 4) {
        pack_pairs_of_places(levels, count, place, room);
        return room;
    }
    for (int64_t at = 0; at < count; at++)
        room[at] = place[levels[at]];
    /* in place: a symbol is not written before what it is made of has been read */
    pack_fields(room, count, 0, needed, room);
    return room;
}

/* What a symbol does to a state: from `full` on, a word leaves it first. A state below that is
 * divided by the symbol's frequency as a product with 2**47 / frequency, rounded up: exact, for 17
 * bits of quotient. */
typedef struct {
    uint64_t reciprocal;
    uint32_t full;
    uint16_t below, others;
} Step;

/* Make the steps of symbols, or, of a symbol that is a single level, of that. */
static void make_steps(const Model *model, Step *steps)
{
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        const uint32_t frequency = model->symbols[symbol].frequency;
        if (frequency != 0)
            steps[model->digits == 1 ? model->level[symbol] : symbol] = (Step){
                .reciprocal = (((uint64_t)1 << 47) + frequency - 1) / frequency,
                .full = frequency << (32 - SCALE_BITS),
                .below = (uint16_t)model->symbols[symbol].below,
                .others = (uint16_t)(SCALE - frequency),
            };
    }
}

/* Add a symbol to a state; the word that leaves it, if one does, goes before `word`. */
static inline uint32_t put(uint32_t state, const Step *step, uint8_t **word)
{
    /* all ones or none: whether one leaves is chance, and no branch could be foretold */
    const int64_t leaves = -(int64_t)(state >= step->full);
    const uint16_t low = (uint16_t)state;
    memcpy(*word - sizeof low, &low, sizeof low);
    *word += 2 * leaves;
    state >>= leaves & 16;
    const uint32_t quotient = (uint32_t)(state * step->reciprocal >> 47);
    /* (quotient << SCALE_BITS) + below + the rest of the division */
    return state + step->below + quotient * step->others;
}

/* Write the states and words of symbols; return how many bytes they take. */
static inline int64_t write_stream(const uint8_t *symbols, int64_t count, int lanes,
                                   const Step *steps, uint8_t *payload)
{
    uint32_t states[MOST_LANES];
    for (int lane = 0; lane < lanes; lane++)
        states[lane] = LOWEST;
    /* from the end on, and then moved to where it belongs */
    uint8_t *const room = payload + 4 * lanes, *const end = room + 2 * count, *word = end;
    int64_t at = count - count % lanes;
    for (int lane = (int)(count - at) - 1; lane >= 0; lane--)
        states[lane] = put(states[lane], &steps[symbols[at + lane]], &word);
    for (at -= lanes; at >= 0; at -= lanes) {
        const uint8_t *const round = symbols + at;
        int lane = lanes - 1;
        /* by four, as not every compiler does it of itself */
        for (; lane >= 3; lane -= 4) {
            states[lane] = put(states[lane], &steps[round[lane]], &word);
            states[lane - 1] = put(states[lane - 1], &steps[round[lane - 1]], &word);
            states[lane - 2] = put(states[lane - 2], &steps[round[lane - 2]], &word);
            states[lane - 3] = put(states[lane - 3], &steps[round[lane - 3]], &word);
        }
        for (; lane >= 0; lane--)
            states[lane] = put(states[lane], &steps[round[lane]], &word);
    }
    memcpy(payload, states, 4 * (size_t)lanes);
    memmove(room, word, (size_t)(end - word));
    return 4 * lanes + (end - word);
}

int64_t topq_write_symbols(const uint8_t *levels, int64_t count, uint8_t *scratch, uint8_t *payload)
{
    uint64_t counts[LEVELS];
    uint8_t codes[LEVELS];
    int top;
    Model model;
    Step steps[SYMBOLS];
    if (count == 0)
        return 0;
    const uint8_t *const spelled = spell(levels, count, scratch, counts);
    const int64_t head = write_weights(counts, codes, &top, payload);
    make_model(codes, top, &model);
    if (model.present == 1)
        return head;
    make_steps(&model, steps);
    const int64_t symbols = (count + model.digits - 1) / model.digits;
    /* of a number that is known here, so that states stay where they are */
    switch (lanes_for(symbols)) {
    case MOST_LANES:
        return head + write_stream(spelled, symbols, MOST_LANES, steps, payload + head);
    case 4:
        return head + write_stream(spelled, symbols, 4, steps, payload + head);
    default:
        return head + write_stream(spelled, symbols, 1, steps, payload + head);
    }
}

typedef struct {
    uint8_t symbol_at[SCALE];
    /* the levels of each, in its first bytes */
    uint64_t spelled[SYMBOLS];
} Slots;

static void make_slots(const Model *model, Slots *slots)
{
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        const Symbol *const one = &model->symbols[symbol];
        uint8_t spelling[MOST_DIGITS] = {0};
        if (one->frequency == 0)
            continue;
        memset(slots->symbol_at + one->below, symbol, one->frequency);
        for (int digit = 0; digit < model->digits; digit++)
            spelling[digit] =
                model->level[symbol >> digit * model->width & ((1 << model->width) - 1)];
        memcpy(&slots->spelled[symbol], spelling, sizeof spelling);
    }
}

typedef struct {
    const uint8_t *word, *end;
    uint8_t *levels;
    int64_t left;
} Reader;

/* Take a symbol from a state, which a word must follow where it is left below LOWEST. */
static inline uint32_t taken(const Model *model, uint32_t state, uint32_t symbol)
{
    const Symbol one = model->symbols[symbol];
    return one.frequency * (state >> SCALE_BITS) + (state & (SCALE - 1)) - one.below;
}

/* Read as many symbols as there are lanes; every step is looked at. */
static int64_t read_carefully(const Model *model, const Slots *slots, uint32_t *states, int lanes,
                              Reader *reader)
{
    for (int lane = 0; lane < lanes && reader->left > 0; lane++) {
        const uint32_t symbol = slots->symbol_at[states[lane] & (SCALE - 1)];
        uint32_t state = taken(model, states[lane], symbol);
        if (state < LOWEST) {
            uint16_t low;
            if (reader->end - reader->word < (int64_t)sizeof low)
                return TOPQ_RANGE;
            memcpy(&low, reader->word, sizeof low);
            reader->word += sizeof low;
            state = state << 16 | low;
        }
        states[lane] = state;
        const uint8_t *const spelling = (const uint8_t *)&slots->spelled[symbol];
        for (int digit = 0; digit < model->digits; digit++)
            if (reader->left > 0) {
                *reader->levels++ = spelling[digit];
                reader->left--;
            } else if (spelling[digit] != model->level[0])
                return TOPQ_PADDING;
    }
    return 0;
}

/* Read a symbol where MOST_DIGITS levels and a word are within bounds. */
static inline uint32_t read_one(const Model *model, const Slots *slots, uint32_t state, int digits,
                                const uint8_t **word, uint8_t **levels)
{
    const uint32_t symbol = slots->symbol_at[state & (SCALE - 1)];
    state = taken(model, state, symbol);
    uint16_t low;
    memcpy(&low, *word, sizeof low);
    memcpy(*levels, &slots->spelled[symbol], MOST_DIGITS);
    *levels += digits;
    /* all ones or none, as in `put` */
    const uint32_t lacks = 0u - (uint32_t)(state < LOWEST);
    *word += lacks & sizeof low;
    return state ^ ((state ^ (state << 16 | low)) & lacks);
}

static inline int64_t read_stream(const Model *model, const Slots *slots, int lanes,
                                  Reader *reader)
{
    uint32_t states[MOST_LANES];
    if (reader->end - reader->word < 4 * lanes)
        return TOPQ_RANGE;
    memcpy(states, reader->word, 4 * (size_t)lanes);
    reader->word += 4 * lanes;
    for (int lane = 0; lane < lanes; lane++)
        if (states[lane] < LOWEST)
            return TOPQ_RANGE;
    const int digits = model->digits;
    const uint8_t *word = reader->word;
    uint8_t *levels = reader->levels;
    /* as many as leave MOST_DIGITS levels behind them */
    int64_t rounds = (reader->left - MOST_DIGITS) / (lanes * digits);
    for (; rounds > 0 && reader->end - word >= 2 * lanes; rounds--) {
        int lane = 0;
        /* by four, as above */
        for (; lane + 4 <= lanes; lane += 4) {
            states[lane] = read_one(model, slots, states[lane], digits, &word, &levels);
            states[lane + 1] = read_one(model, slots, states[lane + 1], digits, &word, &levels);
            states[lane + 2] = read_one(model, slots, states[lane + 2], digits, &word, &levels);
            states[lane + 3] = read_one(model, slots, states[lane + 3], digits, &word, &levels);
        }
        for (; lane < lanes; lane++)
            states[lane] = read_one(model, slots, states[lane], digits, &word, &levels);
    }
    reader->left -= levels - reader->levels;
    reader->word = word;
    reader->levels = levels;
    while (reader->left > 0) {
        const int64_t status = read_carefully(model, slots, states, lanes, reader);
        if (status != 0)
            return status;
    }
    for (int lane = 0; lane < lanes; lane++)
        if (states[lane] != LOWEST)
            return TOPQ_RANGE;
    return reader->word == reader->end ? 0 : TOPQ_RANGE;
}

int64_t topq_read_symbols(const uint8_t *payload, int64_t payload_bytes, uint8_t *levels,
                          int64_t count)
{
    uint8_t codes[LEVELS];
    int top;
    Model model;
    Slots slots;
    if (count == 0)
        return payload_bytes == 0 ? 0 : TOPQ_RANGE;
    const int64_t head = read_weights(payload, payload_bytes, codes, &top);
    if (head < 0)
        return TOPQ_RANGE;
    make_model(codes, top, &model);
    if (model.present == 1) {
        memset(levels, model.level[0], (size_t)count);
        return head == payload_bytes ? 0 : TOPQ_RANGE;
    }
    make_slots(&model, &slots);
    Reader reader = {payload + head, payload + payload_bytes, levels, count};
    switch (lanes_for((count + model.digits - 1) / model.digits)) {
    case MOST_LANES:
        return read_stream(&model, &slots, MOST_LANES, &reader);
    case 4:
        return read_stream(&model, &slots, 4, &reader);
    default:
        return read_stream(&model, &slots, 1, &reader);
    }
}
