// Attention of one token a row to what a policy that chooses in blocks holds, on a processor: what `backends.blocks` does between
// two choices. `attending.py` calls it. Kept tokens in codes are read as they lie, each once, and never held decoded.
//
//     output = Σ_j e^(l_j − largest) v_j / Σ_j e^(l_j − largest)    j: kept tokens, newest ones, the new one, virtual tokens
//
// LANES tokens at a time; `largest` is of those so far, and what was summed before a larger one came is made smaller. Parts of a
// head that several threads go through are put together at the end.
//
// Axes: as in `attend.h`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attend.h"
#include "codes.h"
#include "vector_math.h"

namespace {

const int64_t LEAST_SLOTS = 32; // of a thread
const int64_t AHEAD = 12;       // tokens that are fetched before their turn
const float LOWEST = std::numeric_limits<float>::lowest();

int64_t begin_of(const Attend &a, int64_t head) { return a.starts ? a.starts[head] : a.n / (a.b * a.g) * head; }

// Some slots of a KV head, out of all.
struct Part {
    int64_t head, from, to;
};

// What some tokens give the query heads of a KV head.
struct Sums {
    float *largest; // [s], of their logits
    float *mass;    // [s], of e^(logit − largest)
    float *plain;   // [s, w], of values so weighted
    float *coded;   // [s, w], of those in codes, before H

    static int64_t size(const Attend &a) { return (a.s * (2 + 2 * a.w) + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; }

    static Sums at(const Attend &a, float *room) {
        return {room + 2 * a.s * a.w, room + 2 * a.s * a.w + a.s, room, room + a.s * a.w};
    }

    void clear(const Attend &a) {
        std::fill(plain, plain + 2 * a.s * a.w, 0.0f);
        std::fill(largest, largest + a.s, LOWEST);
        std::fill(mass, mass + a.s, 0.0f);
    }

    // Logits of a tile become weights, [s, LANES].
    void take(const Attend &a, float *logits) {
        for (int64_t h = 0; h < a.s; h++) {
            float *of_head = logits + h * LANES, most = largest[h], sum = 0;
#pragma omp simd reduction(max : most)
            for (int64_t lane = 0; lane < LANES; lane++) most = most < of_head[lane] ? of_head[lane] : most;
            if (most > largest[h]) {
                const float factor = std::exp(largest[h] - most);
                mass[h] *= factor;
                for (int64_t i = 0; i < a.w; i++) plain[h * a.w + i] *= factor;
                for (int64_t i = 0; i < a.w; i++) coded[h * a.w + i] *= factor;
                largest[h] = most;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t lane = 0; lane < LANES; lane++) sum += of_head[lane] = fast_exp(of_head[lane] - most);
            mass[h] += sum;
        }
    }
};

float cap(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

// What `function` does with a tensor of one of the types.
template <typename Function> void by_type(int32_t dtype, const void *tensor, Function function) {
    if (dtype == DTYPE_FLOAT32)
        function(static_cast<const float *>(tensor));
    else if (dtype == DTYPE_BFLOAT16)
        function(static_cast<const bfloat16 *>(tensor));
    else
        function(static_cast<const float16 *>(tensor));
}

float bias_of(const Attend &a, int64_t slot) {
    if (!a.bias) return 0.0f;
    return a.bias_dtype == DTYPE_FLOAT32 ? static_cast<const float *>(a.bias)[slot]
                                         : widen(static_cast<const float16 *>(a.bias)[slot]);
}

// Logits without a mask become those that count: soft-capped, with their biases, -inf where nothing is.
void finish_logits(const Attend &a, const Tile &tile, float *logits) {
    float bias[LANES];
    for (int64_t lane = 0; lane < LANES; lane++)
        bias[lane] = tile.positions[lane] < 0 ? -INFINITE : tile.at[lane] < 0 ? 0.0f : bias_of(a, tile.at[lane]);
    for (int64_t h = 0; h < a.s; h++)
        for (int64_t lane = 0; lane < LANES; lane++) {
            const float logit = logits[h * LANES + lane];
            logits[h * LANES + lane] = tile.positions[lane] < 0 ? -INFINITE : cap(logit, a.softcap) + bias[lane];
        }
}

// Tokens whose keys [n, d] and values [n, w] are numbers. `positions`: null where each is there; `slot`: the first one's, -1 where
// they have none, and no biases.
template <typename T, int D>
void read(
    const Attend &a, const float *queries, const T *keys, const T *values, const int32_t *positions, int64_t slot, int64_t n,
    float *logits, Sums &sums
) {
    const int64_t d = known<D>(a.d), w = known<D>(a.w);
    for (int64_t first = 0; first < n; first += LANES) {
        const int64_t count = std::min(LANES, n - first);
        Tile tile;
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t j = first + std::min(lane, count - 1);
            tile.at[lane] = slot < 0 ? -1 : slot + j;
            tile.positions[lane] = lane >= count ? -1 : positions ? positions[j] : 0;
        }
        std::fill(logits, logits + a.s * LANES, 0.0f);
        for (int64_t lane = 0; lane < count; lane++) {
            if (tile.positions[lane] < 0) continue; // what is left there may be NaN
            const T *key = keys + (first + lane) * d;
            for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(key + AHEAD * d + i);
            for (int64_t h = 0; h < a.s; h++) logits[h * LANES + lane] = dot<D>(queries + h * d, key, d);
        }
        finish_logits(a, tile, logits);
        sums.take(a, logits);
        for (int64_t lane = 0; lane < count; lane++) {
            if (tile.positions[lane] < 0) continue;
            const T *value = values + (first + lane) * w;
            for (int64_t i = 0; i < w; i += 64 / sizeof(T)) __builtin_prefetch(value + AHEAD * w + i);
            for (int64_t h = 0; h < a.s; h++) {
                const float weight = logits[h * LANES + lane];
                float *sum = sums.plain + h * w;
#pragma omp simd
                for (int64_t i = 0; i < w; i++) sum[i] += weight * widen(value[i]);
            }
        }
    }
}

// Scales of a tile's slots, [groups]; 0 where nothing is to be read.
void scales_of(const float16 *scales, int64_t groups, const Tile &tile, const bool *is_read, float factor, Vector *found) {
    for (int64_t group = 0; group < groups; group++) {
        float numbers[LANES];
        for (int64_t lane = 0; lane < LANES; lane++)
            numbers[lane] = is_read[lane] ? widen(scales[tile.at[lane] * groups + group]) * factor : 0.0f;
        found[group] = load(numbers);
    }
}

// Keys [d], as they are at position 0 and with their centers, turned by their positions.
void turn(const Attend &a, const Tile &tile, Vector *keys) {
    float by[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) by[lane] = float(tile.positions[lane]);
    const Vector position = load(by);
    for (int64_t pair = 0; pair < a.p; pair++) {
        Vector sine, cosine;
        sine_and_cosine(position * a.angles[pair], sine, cosine);
        sine *= a.gains[pair];
        Vector &first = keys[a.pairs[pair]], &second = keys[a.pairs[a.p + pair]];
        const Vector turned = first * cosine + second * sine;
        second = second * cosine - first * sine;
        first = turned;
    }
}

// Products of some query heads, S at a time, with keys [d]: [s, LANES].
template <int S, int D> void multiply(const float *queries, const Vector *keys, int64_t given, float *products) {
    const int64_t d = known<D>(given);
    Vector found[S] = {};
    for (int64_t i = 0; i < d; i++)
#pragma GCC unroll 4
        for (int64_t h = 0; h < S; h++) found[h] += queries[h * d + i] * keys[i];
    for (int64_t h = 0; h < S; h++) store(found[h], products + h * LANES);
}

template <int D> void multiply(const float *queries, const Vector *keys, int64_t s, int64_t d, float *products) {
    for (; s >= 4; s -= 4, queries += 4 * d, products += 4 * LANES) multiply<4, D>(queries, keys, d, products);
    if (s == 3) multiply<3, D>(queries, keys, d, products);
    if (s == 2) multiply<2, D>(queries, keys, d, products);
    if (s == 1) multiply<1, D>(queries, keys, d, products);
}

// Values of a tile in codes, weighted: sums [s, w] += weights [groups, s] times levels, where vectors are full.
template <int FORMAT, int W>
void average(const Attend &a, const Levels<FORMAT> &levels, const Tile &tile, const Vector *weights, float *sums) {
    const int64_t w = known<W>(a.w), bytes = bytes_of<FORMAT>(w), half = w / 2, s = a.s;
    const uint8_t *codes = static_cast<const uint8_t *>(a.values);
    for (int64_t first = 0; first < bytes; first += LANES) {
        const float *low_weights = reinterpret_cast<const float *>(weights + first / GROUP * s);
        const float *high_weights = reinterpret_cast<const float *>(weights + (half + first) / GROUP * s);
        for (int64_t lane = 0; lane < LANES; lane += 4) {
            Vector low[4], high[4];
#pragma GCC unroll 4
            for (int64_t k = 0; k < 4; k++) {
                Bytes packed;
                std::memcpy(&packed, codes + tile.at[lane + k] * bytes + first, sizeof packed);
                const Bits wide = __builtin_convertvector(packed, Bits);
                low[k] = levels[wide];
                if (FORMAT == FORMAT_INT4) high[k] = levels[wide >> 4];
            }
            for (int64_t h = 0; h < s; h++) {
                float *to = sums + h * w + first;
                Vector sum = load(to);
#pragma GCC unroll 4
                for (int64_t k = 0; k < 4; k++) sum += low_weights[h * LANES + lane + k] * low[k];
                store(sum, to);
                if (FORMAT == FORMAT_INT4) {
                    sum = load(to + half);
#pragma GCC unroll 4
                    for (int64_t k = 0; k < 4; k++) sum += high_weights[h * LANES + lane + k] * high[k];
                    store(sum, to + half);
                }
            }
        }
    }
}

// The same of any width.
template <int FORMAT> void average_any(const Attend &a, const Tile &tile, const Vector *weights, float *sums) {
    const int64_t bytes = bytes_of<FORMAT>(a.w), half = a.w / 2;
    for (int64_t lane = 0; lane < LANES; lane++) {
        const uint8_t *codes = static_cast<const uint8_t *>(a.values) + tile.at[lane] * bytes;
        for (int64_t i = 0; i < a.w; i++) {
            const int code = FORMAT == FORMAT_INT8 ? codes[i] : i < half ? codes[i] & 15 : codes[i - half] >> 4;
            for (int64_t h = 0; h < a.s; h++) sums[h * a.w + i] += weights[i / GROUP * a.s + h][lane] * a.levels[code];
        }
    }
}

// Slots of a KV head in codes.
template <int FORMAT, int D> void read(const Attend &a, const Part &part, const float *queries, float *logits, Sums &sums) {
    const int64_t d = known<D>(a.d), w = known<D>(a.w), s = a.s, key_groups = groups_of(d), value_groups = groups_of(w);
    const Levels<FORMAT> levels(a.levels);
    const float factor = 1 / std::sqrt(float(hadamard_size(d)));
    static thread_local Buffer buffer;
    Vector *keys = reinterpret_cast<Vector *>(buffer.of_size((d + std::max(key_groups, value_groups * (1 + s))) * LANES + d));
    Vector *scales = keys + d, *weights = scales + value_groups; // [groups], [groups, s]
    float *centers = reinterpret_cast<float *>(scales + std::max(key_groups, value_groups * (1 + s)));
    for (int64_t i = 0; i < d; i++) centers[i] = a.centers ? widen(a.centers[part.head * d + i]) : 0.0f;
    for (int64_t first = part.from; first < part.to; first += LANES) {
        const int64_t count = std::min(LANES, part.to - first);
        Tile tile;
        bool is_read[LANES];
        int64_t of_first = -1; // the lane of the first token, which lies elsewhere too
        for (int64_t lane = 0; lane < LANES; lane++) {
            tile.at[lane] = first + std::min(lane, count - 1);
            tile.positions[lane] = lane < count ? a.positions[tile.at[lane]] : -1;
            is_read[lane] = tile.positions[lane] >= 0;
            if (a.first_keys && tile.positions[lane] == 0) of_first = lane, is_read[lane] = false;
        }
        scales_of(a.key_scales, key_groups, tile, is_read, factor, scales);
        decode<FORMAT, D>(static_cast<const uint8_t *>(a.keys), levels, tile, scales, d, keys);
        hadamard<D>(keys, d);
        for (int64_t i = 0; i < d; i++) keys[i] += centers[i];
        turn(a, tile, keys);
        multiply<D>(queries, keys, s, d, logits);
        if (of_first >= 0)
            for (int64_t h = 0; h < s; h++)
                logits[h * LANES + of_first] = dot<D>(queries + h * d, a.first_keys + part.head * d, d);
        finish_logits(a, tile, logits);
        sums.take(a, logits);
        scales_of(a.value_scales, value_groups, tile, is_read, 1.0f, scales);
        for (int64_t group = 0; group < value_groups; group++)
            for (int64_t h = 0; h < s; h++) weights[group * s + h] = load(logits + h * LANES) * scales[group];
        if (bytes_of<FORMAT>(w) % LANES == 0)
            average<FORMAT, D>(a, levels, tile, weights, sums.coded);
        else
            average_any<FORMAT>(a, tile, weights, sums.coded);
        if (of_first >= 0)
            for (int64_t h = 0; h < s; h++)
                for (int64_t i = 0; i < w; i++)
                    sums.plain[h * w + i] += logits[h * LANES + of_first] * widen(a.first_values[part.head * w + i]);
    }
}

// The tokens of a part, and with the first part of a head the newest ones and the new one.
template <int D> void read(const Attend &a, const Part &part, bool is_first, Sums &sums) {
    const int64_t d = known<D>(a.d), w = known<D>(a.w), s = a.s, head = part.head;
    static thread_local Buffer buffer;
    float *logits = buffer.of_size(s * (LANES + d)), *queries = logits + s * LANES;
    by_type(a.dtype, a.query, [&](auto given) {
        for (int64_t i = 0; i < s * d; i++) queries[i] = widen(given[head * s * d + i]) * a.scaling;
    });
    sums.clear(a);
    if (a.format == FORMAT_INT4)
        read<FORMAT_INT4, D>(a, part, queries, logits, sums);
    else if (a.format == FORMAT_INT8)
        read<FORMAT_INT8, D>(a, part, queries, logits, sums);
    else
        by_type(a.dtype, a.keys, [&](auto keys) {
            const auto values = static_cast<decltype(keys)>(a.values);
            const int64_t from = part.from, n = part.to - from;
            read<std::decay_t<decltype(*keys)>, D>(
                a, queries, keys + from * d, values + from * w, a.positions + from, from, n, logits, sums
            );
        });
    if (!is_first) return;
    by_type(a.newest_dtype, a.newest_keys, [&](auto keys) {
        const auto values = static_cast<decltype(keys)>(a.newest_values);
        const int32_t *positions = a.newest_positions + head / a.g * a.e;
        const int64_t first = head * a.e;
        read<std::decay_t<decltype(*keys)>, D>(
            a, queries, keys + first * d, values + first * w, positions, -1, a.e, logits, sums
        );
    });
    by_type(a.dtype, a.key, [&](auto keys) {
        const auto values = static_cast<decltype(keys)>(a.value);
        read<std::decay_t<decltype(*keys)>, D>(a, queries, keys + head * d, values + head * w, nullptr, -1, 1, logits, sums);
    });
}

// Logits of the virtual tokens for a query head, [r].
void ask_state(const Attend &a, int64_t head, int64_t query_head, const float *query, float *logits) {
    const int64_t r = a.r, d = a.d;
    if (a.state == STATE_LOGITS) {
        std::copy(a.counts + query_head * r, a.counts + (query_head + 1) * r, logits);
        return;
    }
    const float squared = dot<0>(query, query, d);
    for (int64_t j = head * r; j < (head + 1) * r; j++) {
        float logit, variance;
        if (a.state == STATE_MEANS) {
            logit = dot<0>(query, static_cast<const float16 *>(a.state_keys) + j * d, d);
            variance = std::max(a.spreads[j], 0.0f);
        } else {
            const float *keys = static_cast<const float *>(a.state_keys) + j * d, count = std::max(a.counts[j], 1.0f);
            logit = dot<0>(query, keys, d) / count;
            variance = std::max(a.spreads[j] / count - dot<0>(keys, keys, d) / count / count, 0.0f);
        }
        const float spread = std::min(SPREAD * squared * variance / float(d), MOST_SPREAD);
        logits[j - head * r] = cap(logit, a.softcap) + spread + std::log(a.counts[j]); // -inf of an empty one
    }
}

// Number i of the value of virtual token j, out of all.
float state_value(const Attend &a, int64_t j, int64_t i) {
    if (a.state == STATE_MEANS) return widen(static_cast<const float16 *>(a.state_values)[j * a.w + i]);
    const float value = static_cast<const float *>(a.state_values)[j * a.w + i];
    return a.state == STATE_SUMS ? value / std::max(a.counts[j], 1.0f) : value;
}

// The output of a query head: all parts of its KV head, which lie one after the other, and the state.
void put_together(const Attend &a, int64_t query_head, float *room, int64_t parts) {
    const int64_t head = query_head / a.s, h = query_head % a.s, w = a.w, d = a.d, r = a.r;
    static thread_local std::vector<float> buffer;
    buffer.resize(2 * w + d + r);
    float *plain = buffer.data(), *coded = plain + w, *query = coded + w, *logits = query + d;
    by_type(a.dtype, a.query, [&](auto given) {
        for (int64_t i = 0; i < d; i++) query[i] = widen(given[query_head * d + i]) * a.scaling;
    });
    if (a.state != STATE_NONE) ask_state(a, head, query_head, query, logits);
    float largest = a.sinks ? a.sinks[query_head % (a.g * a.s)] : LOWEST;
    for (int64_t part = 0; part < parts; part++)
        largest = std::max(largest, Sums::at(a, room + part * Sums::size(a)).largest[h]);
    for (int64_t j = 0; j < r; j++) largest = std::max(largest, logits[j]);
    std::fill(plain, plain + 2 * w, 0.0f);
    float mass = a.sinks ? std::exp(a.sinks[query_head % (a.g * a.s)] - largest) : 0.0f;
    for (int64_t part = 0; part < parts; part++) {
        const Sums sums = Sums::at(a, room + part * Sums::size(a));
        const float factor = std::exp(sums.largest[h] - largest);
        mass += factor * sums.mass[h];
        for (int64_t i = 0; i < w; i++) plain[i] += factor * sums.plain[h * w + i];
        for (int64_t i = 0; i < w; i++) coded[i] += factor * sums.coded[h * w + i];
    }
    for (int64_t j = 0; j < r; j++) {
        const float weight = std::exp(logits[j] - largest);
        mass += weight;
        for (int64_t i = 0; i < w; i++) plain[i] += weight * state_value(a, head * r + j, i);
    }
    if (a.format != FORMAT_FLOAT) {
        const float factor = 1 / std::sqrt(float(hadamard_size(w)));
        hadamard<0>(coded, w);
        for (int64_t i = 0; i < w; i++) plain[i] += factor * coded[i];
    }
    by_type(a.dtype, a.output, [&](auto typed) {
        const auto output = const_cast<std::decay_t<decltype(*typed)> *>(typed) + query_head * w;
        for (int64_t i = 0; i < w; i++) narrow(plain[i] / mass, output[i]);
    });
}

// The newest states of a KV head, [e, n], and the new one, given as numbers.
void append(const Attend &a, const void *newest, const float *state, int64_t head, int64_t n, void *taken) {
    by_type(a.newest_dtype, newest, [&](auto before) {
        const auto to = static_cast<std::decay_t<decltype(*before)> *>(taken) + head * (a.e + 1) * n;
        std::copy(before + head * a.e * n, before + (head + 1) * a.e * n, to);
        const float most = a.newest_dtype == DTYPE_FLOAT16 && a.dtype != DTYPE_FLOAT16 ? 65504.0f : INFINITE;
        for (int64_t i = 0; i < n; i++) narrow(state[i] < -most ? -most : state[i] > most ? most : state[i], to[a.e * n + i]);
    });
}

// What a query head asks, [d], which is overwritten, in two bits a number, as `slots.formats.QueryCodes`.
void encode(const Attend &a, float *query, uint8_t *codes, float16 &scale) {
    const int64_t d = a.d, bytes = (d + 3) / 4;
    const float factor = 1 / std::sqrt(float(hadamard_size(d)));
    hadamard<0>(query, d);
    float square = 0;
    for (int64_t i = 0; i < d; i++) query[i] *= factor, square += query[i] * query[i];
    narrow(std::min(std::sqrt(square / float(d)), 65504.0f), scale);
    const float divisor = widen(scale) != 0 ? widen(scale) : 1.0f;
    std::fill(codes, codes + bytes, uint8_t(0));
    for (int64_t i = 0; i < d; i++) {
        int code = 0;
        for (int level = 0; level < 3; level++)
            code += query[i] / divisor > (a.query_levels[level] + a.query_levels[level + 1]) / 2;
        codes[i % bytes] |= uint8_t(code << 2 * (i / bytes));
    }
}

// One KV head takes the new token in, behind the newest ones.
void take_in(const Attend &a, int64_t head) {
    const int64_t d = a.d, w = a.w, e = a.e, bytes = (d + 3) / 4;
    static thread_local std::vector<float> buffer;
    buffer.resize(std::max(d, w));
    float *state = buffer.data();
    const auto given = [&](const void *states, int64_t index, int64_t n) {
        by_type(a.dtype, states, [&](auto typed) {
            for (int64_t i = 0; i < n; i++) state[i] = widen(typed[index * n + i]);
        });
        return state;
    };
    append(a, a.newest_keys, given(a.key, head, d), head, d, a.taken_keys);
    append(a, a.newest_values, given(a.value, head, w), head, w, a.taken_values);
    for (int64_t h = head * a.s; h < (head + 1) * a.s; h++) {
        uint8_t *codes = a.taken_codes + h * (e + 1) * bytes;
        float16 *scales = a.taken_scales + h * (e + 1);
        std::copy(a.newest_codes + h * e * bytes, a.newest_codes + (h + 1) * e * bytes, codes);
        std::copy(a.newest_scales + h * e, a.newest_scales + (h + 1) * e, scales);
        encode(a, given(a.query, h, d), codes + e * bytes, scales[e]);
    }
}

// The rows count the new token, where it is one.
void count(const Attend &a) {
    for (int64_t row = 0; row < a.b; row++) {
        const bool arrives = !a.real || a.real[row];
        int32_t *positions = a.taken_positions + row * (a.e + 1);
        std::copy(a.newest_positions + row * a.e, a.newest_positions + (row + 1) * a.e, positions);
        positions[a.e] = arrives ? int32_t(a.seen[row]) : -1;
        a.settled[row] |= a.seen[row] > 0 && arrives;
        a.seen[row] += arrives;
    }
}

// Every thread goes through as many slots as the others, wherever heads begin: some of a head, or several heads.
template <int D> void run(const Attend &a) {
    const int64_t heads = a.b * a.g, threads = std::max<int64_t>(1, std::min(a.threads, a.n / LEAST_SLOTS));
    static thread_local std::vector<Part> parts;
    static thread_local std::vector<int64_t> turns, firsts; // the first part of each thread, and of each head; then how many
    static thread_local Buffer buffer;
    parts.clear();
    turns.assign(1, 0);
    firsts.assign(1, 0);
    for (int64_t head = 0; head < heads; head++) {
        for (int64_t from = begin_of(a, head), to; from < begin_of(a, head + 1); from = to) {
            const int64_t turn_ends = int64_t(turns.size()) * a.n / threads;
            to = std::min(begin_of(a, head + 1), turn_ends);
            parts.push_back({head, from, to});
            if (to == turn_ends) turns.push_back(parts.size());
        }
        firsts.push_back(parts.size());
    }
    float *room = buffer.of_size(parts.size() * Sums::size(a));
    const Part *all_parts = parts.data();
    const int64_t *of_turns = turns.data(), *of_heads = firsts.data(), turn_count = turns.size() - 1;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
#pragma omp for schedule(static, 1)
        for (int64_t turn = 0; turn < turn_count; turn++)
            for (int64_t part = of_turns[turn]; part < of_turns[turn + 1]; part++) {
                Sums sums = Sums::at(a, room + part * Sums::size(a));
                read<D>(a, all_parts[part], part == of_heads[all_parts[part].head], sums);
            }
#pragma omp for
        for (int64_t query_head = 0; query_head < heads * a.s; query_head++) {
            const int64_t first = of_heads[query_head / a.s], last = of_heads[query_head / a.s + 1];
            put_together(a, query_head, room + first * Sums::size(a), last - first);
        }
#pragma omp for
        for (int64_t head = 0; head < (a.taken_keys ? heads : 0); head++) take_in(a, head);
    }
    if (a.taken_keys) count(a);
}

// Whether heads of different sizes lie one after the other, within the tensors, and each has a slot.
bool is_sound(const Attend &a) {
    const int64_t heads = a.b * a.g;
    if (heads < 1 || begin_of(a, 0) != 0 || begin_of(a, heads) != a.n) return false;
    for (int64_t head = 0; head < heads; head++)
        if (begin_of(a, head + 1) <= begin_of(a, head)) return false;
    return true;
}

} // namespace

// Whether the token was read; if not, nothing has changed.
extern "C" bool less_attend(const Attend *attend) {
    if (!is_sound(*attend)) return false;
    const int64_t d = attend->d == attend->w ? attend->d : 0;
    (d == 64 ? run<64> : d == 128 ? run<128> : run<0>)(*attend);
    return true;
}
