// Attention of a prompt on a processor, and the attention that each of its tokens gets, in one pass: what
// `ops.attention.causal_blocks` does. `bridge.py` calls it. A row may begin with padding: it is as if the row began after it.
//
//     l = scaling · Q Kᵀ, causal     P = softmax(l)     output = P V     received_j += Σ_{heads of the group, queries} P_ij
//
// A few queries of all heads of a KV head make ROWS rows. Their weights over all keys are held, in tiles of LANES columns that
// lie one after the other, so that they stay in the processor's second cache; keys are packed in the same way, and values dense.
//
// Axes: b rows, g KV heads, s query heads per KV head, n tokens, d head dim, a multiple of 64.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vector_math.h"

// A tensor `[b, heads, n, d]` whose last dimension is dense; the numbers from one row, head and token to the next.
struct States {
    float *data;
    int64_t row, head, token;
};

struct Prompt {
    int64_t b, g, s, n, d, start, threads; // start: the first query
    float scaling;
    const int64_t *padding; // [b], tokens that are no part of the text, before it
    States query;           // [b, g·s, n, d]
    States key;             // [b, g, n, d]
    States value;           // [b, g, n, d], or null: no output
    States output;          // [b, g·s, n, d], or null; nothing is written for padding
    float *received;        // [b, g, n], dense, added to
};

static_assert(sizeof(Prompt) == BYTES_OF_PROMPT, "`layout.py` has the same fields");

namespace {

#ifdef __AVX512F__
const int64_t LANES = 16, ROWS_AT_ONCE = 8, MEANS_AT_ONCE = 6; // what 32 registers hold
#else
const int64_t LANES = 8, ROWS_AT_ONCE = 4, MEANS_AT_ONCE = 3; // what 16 registers hold
#endif
const int64_t ROWS = MOST_QUERY_HEADS; // of several queries where a KV head has fewer
static_assert(ROWS % ROWS_AT_ONCE == 0 && ROWS % MEANS_AT_ONCE == 0, "blocks of rows are full");
const int64_t TILES_AT_ONCE = 3, VECTORS_AT_ONCE = 4, TILES_IN_CACHE = 8;

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

inline Vector load(const float *from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(Vector vector, float *to) { std::memcpy(to, &vector, sizeof vector); }

// A KV head and its query heads, from the row's first token on.
struct Head {
    int64_t n;
    const float *query, *key, *value; // value: null where there is no output
    float *output;
    float *keys;   // [tiles, d, LANES], packed
    float *values; // [tiles · LANES, d], packed
};

// A tile of keys as `[d, LANES]`, 0 beyond the last, and its values as `[LANES, d]`.
void pack(const Prompt &prompt, const Head &head, int64_t tile) {
    const int64_t d = prompt.d, first = tile * LANES;
    float *keys = head.keys + first * d, *values = head.values + first * d;
    for (int64_t i = 0; i < d; i++)
        for (int64_t lane = 0; lane < LANES; lane++)
            keys[i * LANES + lane] = first + lane < head.n ? head.key[(first + lane) * prompt.key.token + i] : 0.0f;
    if (!head.value) return;
    for (int64_t j = first; j < std::min(first + LANES, head.n); j++)
        std::memcpy(values + (j - first) * d, head.value + j * prompt.value.token, d * sizeof(float));
}

// Logits of ROWS rows, `[ROWS, d]`, over `tiles` tiles: `[tiles, ROWS, LANES]`.
void multiply(const float *rows, const float *packed, int64_t tiles, int64_t d, float *logits) {
    for (int64_t tile = 0; tile < tiles; tile += TILES_AT_ONCE)
        for (int64_t row = 0; row < ROWS; row += ROWS_AT_ONCE) {
            Vector sums[ROWS_AT_ONCE][TILES_AT_ONCE] = {};
            const float *of_rows = rows + row * d, *keys = packed + tile * d * LANES;
            for (int64_t i = 0; i < d; i++) {
                Vector columns[TILES_AT_ONCE];
#pragma GCC unroll 8
                for (int64_t t = 0; t < TILES_AT_ONCE; t++) columns[t] = load(keys + (t * d + i) * LANES);
#pragma GCC unroll 8
                for (int64_t r = 0; r < ROWS_AT_ONCE; r++)
#pragma GCC unroll 8
                    for (int64_t t = 0; t < TILES_AT_ONCE; t++) sums[r][t] += of_rows[r * d + i] * columns[t];
            }
#pragma GCC unroll 8
            for (int64_t t = 0; t < TILES_AT_ONCE; t++)
#pragma GCC unroll 8
                for (int64_t r = 0; r < ROWS_AT_ONCE; r++) store(sums[r][t], logits + ((tile + t) * ROWS + row + r) * LANES);
        }
}

// means `[ROWS, d]` += weights `[tiles, ROWS, LANES]` times `columns` values, `[columns, d]`.
void average(const float *weights, const float *values, int64_t columns, int64_t d, float *means) {
    for (int64_t row = 0; row < ROWS; row += MEANS_AT_ONCE)
        for (int64_t first = 0; first < d; first += VECTORS_AT_ONCE * LANES) {
            Vector sums[MEANS_AT_ONCE][VECTORS_AT_ONCE];
            float *to = means + row * d + first;
#pragma GCC unroll 8
            for (int64_t r = 0; r < MEANS_AT_ONCE; r++)
#pragma GCC unroll 8
                for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) sums[r][v] = load(to + r * d + v * LANES);
            for (int64_t j = 0; j < columns; j++) {
                const float *of_column = weights + (j / LANES * ROWS + row) * LANES + j % LANES;
                Vector value[VECTORS_AT_ONCE];
#pragma GCC unroll 8
                for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) value[v] = load(values + j * d + first + v * LANES);
#pragma GCC unroll 8
                for (int64_t r = 0; r < MEANS_AT_ONCE; r++)
#pragma GCC unroll 8
                    for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) sums[r][v] += of_column[r * LANES] * value[v];
            }
#pragma GCC unroll 8
            for (int64_t r = 0; r < MEANS_AT_ONCE; r++)
#pragma GCC unroll 8
                for (int64_t v = 0; v < VECTORS_AT_ONCE; v++) store(sums[r][v], to + r * d + v * LANES);
        }
}

// The queries from `first` to `last` of a KV head, all its query heads. `weights`: `[tiles, ROWS, LANES]`, overwritten.
void attend(const Prompt &prompt, const Head &head, int64_t first, int64_t last, float *weights, float *received) {
    const int64_t s = prompt.s, d = prompt.d, queries = last - first;
    const int64_t tiles = (last + LANES - 1) / LANES;
    static thread_local std::vector<float> buffer;
    buffer.resize(2 * ROWS * d);
    float *rows = buffer.data(), *means = rows + ROWS * d;
    std::fill(rows, rows + 2 * ROWS * d, 0.0f); // rows beyond s · queries are 0, and count for nothing
    for (int64_t h = 0; h < s; h++)
        for (int64_t q = 0; q < queries; q++) {
            const float *query = head.query + h * prompt.query.head + (first + q) * prompt.query.token;
            for (int64_t i = 0; i < d; i++) rows[(h * queries + q) * d + i] = prompt.scaling * query[i];
        }
    multiply(rows, head.keys, tiles, d, weights);
    for (int64_t tile = first / LANES; tile < tiles; tile++) // what later queries bring is not seen
        for (int64_t row = 0; row < ROWS; row++)
            for (int64_t lane = 0; lane < LANES; lane++)
                if (tile * LANES + lane > first + row % queries) weights[(tile * ROWS + row) * LANES + lane] = -INFINITE;

    float largest[ROWS * LANES], sums[ROWS * LANES], factors[ROWS];
    std::fill(largest, largest + ROWS * LANES, -INFINITE);
    std::fill(sums, sums + ROWS * LANES, 0.0f);
    for (int64_t tile = 0; tile < tiles; tile++)
#pragma omp simd
        for (int64_t i = 0; i < ROWS * LANES; i++) {
            const float logit = weights[tile * ROWS * LANES + i];
            largest[i] = largest[i] < logit ? logit : largest[i];
        }
    for (int64_t row = 0; row < ROWS; row++) {
        float *of_row = largest + row * LANES;
        std::fill(of_row, of_row + LANES, *std::max_element(of_row, of_row + LANES));
    }
    for (int64_t tile = 0; tile < tiles; tile++)
#pragma omp simd
        for (int64_t i = 0; i < ROWS * LANES; i++) {
            const float weight = fast_exp(weights[tile * ROWS * LANES + i] - largest[i]);
            weights[tile * ROWS * LANES + i] = weight;
            sums[i] += weight;
        }
    for (int64_t row = 0; row < ROWS; row++) {
        float sum = 0;
        for (int64_t lane = 0; lane < LANES; lane++) sum += sums[row * LANES + lane];
        factors[row] = row < s * queries ? 1.0f / sum : 0.0f;
    }
    for (int64_t tile = 0; tile < tiles; tile += TILES_IN_CACHE) {
        const int64_t end = std::min(tile + TILES_IN_CACHE, tiles), column = tile * LANES;
        for (int64_t t = tile; t < end; t++) {
            Vector column_sums = load(received + t * LANES);
            for (int64_t row = 0; row < ROWS; row++) column_sums += factors[row] * load(weights + (t * ROWS + row) * LANES);
            store(column_sums, received + t * LANES);
        }
        if (head.value) {
            const int64_t columns = std::min(end * LANES, last) - column;
            average(weights + tile * ROWS * LANES, head.values + column * d, columns, d, means);
        }
    }
    if (!head.value) return;
    for (int64_t h = 0; h < s; h++)
        for (int64_t q = 0; q < queries; q++) {
            const int64_t row = h * queries + q;
            float *output = head.output + h * prompt.output.head + (first + q) * prompt.output.token;
            for (int64_t i = 0; i < d; i++) output[i] = factors[row] * means[row * d + i];
        }
}

} // namespace

extern "C" void less_read_prompt(const Prompt *given) {
    const Prompt &prompt = *given;
    const int64_t d = prompt.d, queries = ROWS / prompt.s;
    const int64_t most_tiles = (prompt.n + TILES_AT_ONCE * LANES - 1) / (TILES_AT_ONCE * LANES) * TILES_AT_ONCE;
    std::vector<float> keys(most_tiles * LANES * d), values(prompt.value.data ? most_tiles * LANES * d : 0);
    std::vector<float> received(prompt.threads * most_tiles * LANES);
    for (int64_t i = 0; i < prompt.b * prompt.g; i++) {
        const int64_t row = i / prompt.g, kv_head = i % prompt.g, padding = prompt.padding[row];
        const auto begin = [&](const States &states, int64_t heads) {
            return states.data ? states.data + row * states.row + kv_head * heads * states.head + padding * states.token : nullptr;
        };
        const Head head = {
            prompt.n - padding,
            begin(prompt.query, prompt.s),
            begin(prompt.key, 1),
            begin(prompt.value, 1),
            begin(prompt.output, prompt.s),
            keys.data(),
            values.data(),
        };
        const int64_t start = std::max<int64_t>(prompt.start - padding, 0), blocks = (head.n - start + queries - 1) / queries;
        const int64_t tiles = (head.n + TILES_AT_ONCE * LANES - 1) / (TILES_AT_ONCE * LANES) * TILES_AT_ONCE;
        std::fill(received.begin(), received.end(), 0.0f);
#pragma omp parallel num_threads(int(prompt.threads))
        {
            static thread_local std::vector<float> weights;
            weights.resize(most_tiles * ROWS * LANES);
#pragma omp for
            for (int64_t tile = 0; tile < tiles; tile++) pack(prompt, head, tile);
#pragma omp for schedule(static, 1)
            for (int64_t lane = 0; lane < prompt.threads; lane++) // the same sums in the same order in every run
                for (int64_t block = lane; block < blocks; block += prompt.threads) {
                    const int64_t first = start + block * queries, last = std::min(first + queries, head.n);
                    attend(prompt, head, first, last, weights.data(), received.data() + lane * most_tiles * LANES);
                }
        }
        for (int64_t lane = 0; lane < prompt.threads; lane++)
            for (int64_t j = 0; j < head.n; j++)
                prompt.received[i * prompt.n + padding + j] += received[lane * most_tiles * LANES + j];
    }
}
