/* Entropy coding of small numbers: range asymmetric numeral systems (Duda, arXiv:1311.2540), in
 * interleaved lanes (Giesen, arXiv:1402.3392), several numbers to a symbol. */
#include "symbol_model.h"

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

/* Write places, each in `width` bits; fields at the end that nothing is left for are 0. */
static void pack_fields(const uint8_t *places, int64_t count, int width, uint8_t *symbols)
{
    const int digits = 8 / width;
    const int64_t whole = count / digits;
    for (int64_t at = 0; at < whole; at++) {
        if (width == 1) {
            uint64_t fields;
            memcpy(&fields, places + 8 * at, sizeof fields);
            fields |= fields >> 7;
            fields |= fields >> 14;
            symbols[at] = (uint8_t)(fields | fields >> 28);
        } else if (width == 2) {
            uint32_t fields;
            memcpy(&fields, places + 4 * at, sizeof fields);
            fields |= fields >> 6;
            symbols[at] = (uint8_t)(fields | fields >> 12);
        } else if (width == 4) {
            uint16_t fields;
            memcpy(&fields, places + 2 * at, sizeof fields);
            symbols[at] = (uint8_t)(fields | fields >> 4);
        } else
            symbols[at] = places[at];
    }
    if (whole * digits < count) {
        uint32_t symbol = 0;
        for (int64_t digit = 0; whole * digits + digit < count; digit++)
            symbol |= (uint32_t)places[whole * digits + digit] << digit * width;
        symbols[whole] = (uint8_t)symbol;
    }
}

/* Write all levels as symbols, one field for each that is present, and count levels. Where they are
 * few and none is missing below the highest, symbols are counted, as they are fewer. */
static void spell(const uint8_t *levels, int64_t count, uint8_t *symbols, uint64_t *counts)
{
    uint8_t top = 0, place[LEVELS];
    for (int64_t at = 0; at < count; at++)
        top = levels[at] > top ? levels[at] : top;
    int width = width_for(top + 1), present = 0;
    if (width < 8) {
        uint64_t of_symbols[SYMBOLS];
        const int digits = 8 / width;
        pack_fields(levels, count, width, symbols);
        count_bytes(symbols, (count + digits - 1) / digits, of_symbols);
        memset(counts, 0, LEVELS * sizeof *counts);
        for (int symbol = 0; symbol < SYMBOLS; symbol++)
            for (int bits = 0; bits < 8; bits += width)
                counts[symbol >> bits & ((1 << width) - 1)] += of_symbols[symbol];
        counts[0] -= (uint64_t)((digits - count % digits) % digits);
    } else
        count_bytes(levels, count, counts);
    for (int level = 0; level < LEVELS; level++) {
        place[level] = (uint8_t)present;
        present += counts[level] != 0;
    }
    if (present == top + 1) {
        if (width == 8)
            memcpy(symbols, levels, (size_t)count);
        return;
    }
    for (int64_t at = 0; at < count; at++)
        symbols[at] = place[levels[at]];
    /* in place: a symbol is not written before what it is made of has been read */
    pack_fields(symbols, count, width_for(present), symbols);
}

/* Add a symbol to a state; the word that leaves it, if one does, goes before `word`. */
static inline uint32_t put(uint32_t state, const Symbol *symbol, uint8_t **word)
{
    const uint32_t leaves = state >> (32 - SCALE_BITS) >= symbol->frequency;
    const uint16_t low = (uint16_t)state;
    memcpy(*word - sizeof low, &low, sizeof low);
    *word -= leaves * sizeof low;
    state >>= leaves * 16;
    /* one too small at most: 2**46 / frequency has been rounded down */
    uint32_t quotient = (uint32_t)(state * symbol->reciprocal >> 46);
    const uint32_t rest = state - quotient * symbol->frequency, more = rest >= symbol->frequency;
    quotient += more;
    return (quotient << SCALE_BITS) + rest - (symbol->frequency & (0u - more)) + symbol->below;
}

/* Write the states and words of symbols; return how many bytes they take. */
static int64_t write_stream(const uint8_t *symbols, int64_t count, int lanes, const Model *model,
                            uint8_t *payload)
{
    uint32_t states[MOST_LANES];
    for (int lane = 0; lane < lanes; lane++)
        states[lane] = LOWEST;
    /* from the end on, and then moved to where it belongs */
    uint8_t *const room = payload + 4 * lanes, *const end = room + 2 * count, *word = end;
    for (int64_t at = count - 1; at >= 0;) {
        int lane = (int)(at % lanes);
        at -= lane + 1;
        for (; lane >= 0; lane--)
            states[lane] = put(states[lane], &model->symbols[symbols[at + 1 + lane]], &word);
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
    if (count == 0)
        return 0;
    spell(levels, count, scratch, counts);
    const int64_t head = write_weights(counts, codes, &top, payload);
    make_model(codes, top, &model);
    if (model.present == 1)
        return head;
    for (int symbol = 0; symbol < SYMBOLS; symbol++)
        if (model.symbols[symbol].frequency)
            model.symbols[symbol].reciprocal =
                ((uint64_t)1 << 46) / model.symbols[symbol].frequency;
    const int64_t symbols = (count + model.digits - 1) / model.digits;
    /* of a number that is known here, so that states stay where they are */
    switch (lanes_for(symbols)) {
    case MOST_LANES:
        return head + write_stream(scratch, symbols, MOST_LANES, &model, payload + head);
    case 4:
        return head + write_stream(scratch, symbols, 4, &model, payload + head);
    default:
        return head + write_stream(scratch, symbols, 1, &model, payload + head);
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
    return model->symbols[symbol].frequency * (state >> SCALE_BITS) + (state & (SCALE - 1)) -
           model->symbols[symbol].below;
}

/* Read as many symbols as there are lanes; every step is looked at. */
static int64_t read_carefully(const Model *model, const uint8_t *symbol_at,
                              const uint64_t *spelled, uint32_t *states, int lanes, Reader *reader)
{
    for (int lane = 0; lane < lanes && reader->left > 0; lane++) {
        const uint32_t symbol = symbol_at[states[lane] & (SCALE - 1)];
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
        const uint8_t *const spelling = (const uint8_t *)&spelled[symbol];
        for (int digit = 0; digit < model->digits; digit++)
            if (reader->left > 0) {
                *reader->levels++ = spelling[digit];
                reader->left--;
            } else if (spelling[digit] != model->level[0])
                return TOPQ_PADDING;
    }
    return 0;
}

static int64_t read_stream(const Model *model, const uint8_t *symbol_at, const uint64_t *spelled,
                           int lanes, Reader *reader)
{
    uint32_t states[MOST_LANES];
    if (reader->end - reader->word < 4 * lanes)
        return TOPQ_RANGE;
    memcpy(states, reader->word, 4 * (size_t)lanes);
    reader->word += 4 * lanes;
    for (int lane = 0; lane < lanes; lane++)
        if (states[lane] < LOWEST)
            return TOPQ_RANGE;
    /* where a word and MOST_DIGITS levels for each lane are sure to be within bounds */
    const int digits = model->digits;
    while (reader->end - reader->word >= 2 * lanes &&
           reader->left >= lanes * digits + MOST_DIGITS) {
        const uint8_t *word = reader->word;
        uint8_t *levels = reader->levels;
        for (int lane = 0; lane < lanes; lane++) {
            const uint32_t symbol = symbol_at[states[lane] & (SCALE - 1)];
            const uint32_t state = taken(model, states[lane], symbol), lacks = state < LOWEST;
            uint16_t low;
            memcpy(&low, word, sizeof low);
            word += lacks * sizeof low;
            /* which way is chance: no branch could be foretold */
            states[lane] = state << (16 * lacks) | (low & (0u - lacks));
            memcpy(levels, &spelled[symbol], MOST_DIGITS);
            levels += digits;
        }
        reader->word = word;
        reader->levels = levels;
        reader->left -= lanes * digits;
    }
    while (reader->left > 0) {
        const int64_t status =
            read_carefully(model, symbol_at, spelled, states, lanes, reader);
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
    uint8_t codes[LEVELS], symbol_at[SCALE];
    uint64_t spelled[SYMBOLS];
    int top;
    Model model;
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
    for (int symbol = 0; symbol < SYMBOLS; symbol++) {
        const Symbol *const one = &model.symbols[symbol];
        memset(symbol_at + one->below, symbol, one->frequency);
        uint8_t spelling[MOST_DIGITS] = {0};
        if (one->frequency)
            for (int digit = 0; digit < model.digits; digit++)
                spelling[digit] =
                    model.level[symbol >> digit * model.width & ((1 << model.width) - 1)];
        memcpy(&spelled[symbol], spelling, sizeof spelling);
    }
    Reader reader = {payload + head, payload + payload_bytes, levels, count};
    switch (lanes_for((count + model.digits - 1) / model.digits)) {
    case MOST_LANES:
        return read_stream(&model, symbol_at, spelled, MOST_LANES, &reader);
    case 4:
        return read_stream(&model, symbol_at, spelled, 4, &reader);
    default:
        return read_stream(&model, symbol_at, spelled, 1, &reader);
    }
}
