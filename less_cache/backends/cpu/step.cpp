// A decoding step of one layer on a processor, in one call: what `LESSLayer._step` does. `native.py` compiles and calls it.
//
// Axes: b rows, g KV heads, s query heads per KV head, c slots, d head dim, w width of values, r virtual tokens, m hidden
// size, e = width of what the state sums: w, or w + d where centroids have a mean key. Tensors lie dense, in this order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vector_math.h"

namespace {

enum Dtype { FLOAT32, BFLOAT16 };
enum Policy { H2O, SINK_RECENT };
enum Memory { NONE, LOW_RANK, SOFT_CENTROIDS, CENTROIDS };

const float TINY = std::numeric_limits<float>::min();
const float MOST_WEIGHT = 20.0f; // `soft_centroids.MOST_WEIGHT`
const float RMS_EPS = 1e-6f;
const int64_t LEAST_PART = 32; // slots
const int64_t AHEAD = 12;      // slots that are fetched before their turn
const float SPREAD = 0.25f, MOST_SPREAD = 2.0f; // `centroids.SPREAD` and `centroids.MOST_SPREAD`

} // namespace

// The weights of φ or of ψ, float32, for each of its heads. Low rank: w1, w2, and for ψ w3, s1, s2. Centroids: w1, b1, w2,
// w3, b2.
struct Network {
    const float *w1; // [d, m]
    const float *b1; // [m]
    const float *w2; // [m, r]
    const float *w3; // [d, r], or [r, r] of the low-rank ψ
    const float *b2; // [r]
    const float *s1; // [r]
    const float *s2; // [r]
};

struct Step {
    int64_t b, g, s, c, d, w, r, m, threads;
    int32_t dtype, policy, memory;
    float scaling, softcap; // softcap 0: none
    const void *query;      // [b, g, s, d]
    const void *key;        // [b, g, d]
    const void *value;      // [b, g, w]
    const bool *real;       // [b], which tokens are not padding, or null: all
    const float *sinks;     // [g, s] or null
    void *keys;             // [b, g, c, d], in place, as all below but the weights and counts
    void *values;           // [b, g, c, w]
    int32_t *positions;     // [b, g, c], -1: empty
    float *scores;          // [b, g, c]
    int64_t *seen;          // [b]
    const int64_t *counts;  // [b, 2]
    bool *settled;          // [b]
    float *values_sum;      // [b, g, r, e]
    float *features_sum;    // [b, g, r], or how many tokens untrained centroids have
    float *keys_sum;        // [b, g, r, d] of untrained centroids
    float *squares_sum;     // [b, g, r] of untrained centroids
    Network query_network;  // of g·s heads
    Network key_network;    // of g heads
    const float *fading;    // [g, r], √λ, or null
    const float *limit;     // [g, r], log L, or null
    void *output;           // [b, g, s, w]
};

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float x) { return x; }

inline float widen(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float &to) { to = x; }

inline void narrow(float x, bfloat16 &to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); // to the nearest, ties to even
}

// x Φ(x), with erf to 2e-7 (Abramowitz and Stegun, 7.1.26).
inline float gelu(float x) {
    const float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float erf = 1.0f - p * fast_exp(-z * z);
    return 0.5f * x * (1.0f + (x < 0 ? -erf : erf));
}

inline void gelu(float *x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = gelu(x[i]);
}

// Loops over a number known to the compiler are several times faster: N, or n where N is 0.
template <int N> inline int64_t known(int64_t n) { return N ? N : n; }

template <int N, typename T> inline float dot(const float *a, const T *b, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < known<N>(n); i++) sum += a[i] * widen(b[i]);
    return sum;
}

// y[j] += Σ_i x[i] weights[i, j]
template <int N> inline void add_product_of(const float *x, const float *weights, float *y, int64_t rows, int64_t columns) {
    const int64_t n = known<N>(columns);
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] += x[i] * weights[i * n + j];
}

inline void add_product(const float *x, const float *weights, float *y, int64_t rows, int64_t columns) {
    (columns == 4   ? add_product_of<4>
     : columns == 8 ? add_product_of<8>
                    : add_product_of<0>)(x, weights, y, rows, columns);
}

// g(g(x W1) W2), what φ and ψ of the low-rank state begin with.
void low_rank_features(const Network &of, int64_t head, const float *x, float *features, float *hidden, const Step &step) {
    const int64_t d = step.d, m = step.m, r = step.r;
    std::fill(hidden, hidden + m, 0.0f);
    std::fill(features, features + r, 0.0f);
    add_product(x, of.w1 + head * d * m, hidden, d, m);
    gelu(hidden, m);
    add_product(hidden, of.w2 + head * m * r, features, m, r);
    gelu(features, r);
}

// a(x) of the centroids: GELU(x W1 + b1) W2 + x W3 + b2 of x over its root mean square, which overwrites x.
void centroid_features(const Network &of, int64_t head, float *x, float *features, float *hidden, const Step &step) {
    const int64_t d = step.d, m = step.m, r = step.r;
    const float norm = 1.0f / std::sqrt(dot<0>(x, x, d) / float(d) + RMS_EPS);
    for (int64_t i = 0; i < d; i++) x[i] *= norm;
    std::copy(of.b1 + head * m, of.b1 + (head + 1) * m, hidden);
    std::copy(of.b2 + head * r, of.b2 + (head + 1) * r, features);
    add_product(x, of.w1 + head * d * m, hidden, d, m);
    gelu(hidden, m);
    add_product(hidden, of.w2 + head * m * r, features, m, r);
    add_product(x, of.w3 + head * d * r, features, d, r);
}

// ψ of a key, which it may overwrite.
void key_features(int64_t head, float *key, float *features, float *hidden, const Step &step) {
    const Network &of = step.key_network;
    const int64_t r = step.r;
    if (step.memory == SOFT_CENTROIDS) {
        centroid_features(of, head, key, features, hidden, step);
        for (int64_t j = 0; j < r; j++)
            features[j] = std::exp(std::min(std::max(features[j], -MOST_WEIGHT), MOST_WEIGHT));
        return;
    }
    std::vector<float> mixed(r, 0.0f);
    low_rank_features(of, head, key, features, hidden, step);
    for (int64_t j = 0; j < r; j++) features[j] *= std::fabs(of.s1[head * r + j]);
    add_product(features, of.w3 + head * r * r, mixed.data(), r, r);
    for (int64_t j = 0; j < r; j++) features[j] = std::fabs(features[j] + of.s2[head * r + j] * mixed[j]);
}

inline bool is_real(const Step &step, int64_t row) { return !step.real || step.real[row]; }

inline float cap(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

// Shares of one query head's attention: that of the kept tokens, of which largest + log(mass) is the log-sum-exp, and for each
// virtual token its own over its mass, which are the factors of what the state sums. [1 + r]
void share_attention(
    const Step &step, int64_t head, int64_t group_head, const float *query, float largest, float mass, float *shares
) {
    const int64_t r = step.r, d = step.d, w = step.w, e = step.memory == SOFT_CENTROIDS ? w + d : w;
    const float *sums = step.values_sum + head * r * e, *masses = step.features_sum + head * r;
    float *logits = shares + 1;
    static thread_local std::vector<float> buffer;
    buffer.resize(step.m + d);
    float *hidden = buffer.data(), *x = hidden + step.m;
    std::copy(query, query + d, x);
    if (step.memory == CENTROIDS) {
        const float squared = dot<0>(query, query, d) * step.scaling * step.scaling;
        for (int64_t j = 0; j < r; j++) {
            const float count = std::max(masses[j], 1.0f), *keys = step.keys_sum + (head * r + j) * d;
            const float mean_square = step.squares_sum[head * r + j] / count;
            const float variance = std::max(mean_square - dot<0>(keys, keys, d) / count / count, 0.0f) / float(d);
            logits[j] = cap(dot<0>(query, keys, d) * step.scaling / count, step.softcap);
            logits[j] += std::min(SPREAD * squared * variance, MOST_SPREAD);
        }
    } else if (step.memory == SOFT_CENTROIDS) {
        centroid_features(step.query_network, group_head, x, logits, hidden, step);
        for (int64_t j = 0; j < r; j++)
            logits[j] += cap(dot<0>(query, sums + j * e + w, d) * step.scaling / std::max(masses[j], TINY), step.softcap);
    } else {
        low_rank_features(step.query_network, group_head, x, logits, hidden, step);
        for (int64_t j = 0; j < r; j++) logits[j] = std::log(std::max(std::fabs(logits[j]), TINY));
    }
    float most = largest;
    for (int64_t j = 0; j < r; j++) {
        const float limit = step.limit ? std::log1p(masses[j] * std::exp(-step.limit[head % step.g * r + j])) : 0.0f;
        logits[j] = masses[j] > 0 ? logits[j] + std::log(masses[j]) - limit : -INFINITE; // an empty one has no share
        most = std::max(most, logits[j]);
    }
    float total = shares[0] = mass * std::exp(largest - most);
    for (int64_t j = 0; j < r; j++) total += logits[j] = std::exp(logits[j] - most);
    shares[0] /= total;
    for (int64_t j = 0; j < r; j++) logits[j] = masses[j] > 0 ? logits[j] / total / masses[j] : 0.0f;
}

// One KV head of one row, out of b·g: the new token goes into an empty slot.
template <typename T> void write(const Step &step, int64_t head) {
    const int64_t c = step.c, d = step.d, w = step.w;
    const T *key = static_cast<const T *>(step.key) + head * d, *value = static_cast<const T *>(step.value) + head * w;
    int32_t *positions = step.positions + head * c;
    const int64_t slot = std::min_element(positions, positions + c) - positions;
    std::copy(key, key + d, static_cast<T *>(step.keys) + (head * c + slot) * d);
    std::copy(value, value + w, static_cast<T *>(step.values) + (head * c + slot) * w);
    positions[slot] = int32_t(step.seen[head / step.g]);
    step.scores[head * c + slot] = 0;
}

// Logits of some slots of a KV head, for its query heads: weights [s, c].
template <typename T, int D> void weigh(const Step &step, int64_t head, int64_t from, int64_t to, float *weights) {
    const int64_t s = step.s, c = step.c, d = known<D>(step.d);
    const T *keys = static_cast<const T *>(step.keys) + head * c * d;
    const T *given = static_cast<const T *>(step.query) + head * s * d;
    const int32_t *positions = step.positions + head * c;
    static thread_local std::vector<float> buffer;
    buffer.resize(s * d);
    float *queries = buffer.data();
    for (int64_t i = 0; i < s * d; i++) queries[i] = widen(given[i]) * step.scaling;
    for (int64_t j = from; j < to; j++) {
        for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(keys + (j + AHEAD) * d + i);
        for (int64_t h = 0; h < s; h++) {
            const float logit = cap(dot<D>(queries + h * d, keys + j * d, d), step.softcap);
            weights[h * c + j] = positions[j] < 0 ? -INFINITE : logit;
        }
    }
}

// Softmax of a query head's logits over the kept tokens, in place, [c], and its shares.
template <typename T> void normalise(const Step &step, int64_t query_head, float *weights, float *shares) {
    const int64_t head = query_head / step.s, group_head = query_head % (step.g * step.s), c = step.c, d = step.d;
    float largest = -INFINITE, mass = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < c; j++) largest = largest < weights[j] ? weights[j] : largest;
    if (step.sinks) largest = std::max(largest, step.sinks[group_head]);
#pragma omp simd reduction(+ : mass)
    for (int64_t j = 0; j < c; j++) {
        weights[j] = fast_exp(weights[j] - largest);
        mass += weights[j];
    }
    if (step.sinks) mass += std::exp(step.sinks[group_head] - largest);
    for (int64_t j = 0; j < c; j++) weights[j] /= mass;
    shares[0] = 1;
    if (step.memory == NONE) return;
    static thread_local std::vector<float> query;
    query.resize(d);
    const T *given = static_cast<const T *>(step.query) + query_head * d;
    for (int64_t i = 0; i < d; i++) query[i] = widen(given[i]);
    share_attention(step, head, group_head, query.data(), largest, mass, shares);
}

// Weighted values of some slots of a KV head, for its query heads: means [s, w].
template <typename T, int D>
void average(const Step &step, int64_t head, int64_t from, int64_t to, const float *weights, float *means) {
    const int64_t s = step.s, c = step.c, w = known<D>(step.w);
    const T *values = static_cast<const T *>(step.values) + head * c * w;
    std::fill(means, means + s * w, 0.0f);
    for (int64_t j = from; j < to; j++) {
        if (step.positions[head * c + j] < 0) continue; // what is left there may be NaN
        const T *value = values + j * w;
        for (int64_t i = 0; i < w; i += 64 / sizeof(T)) __builtin_prefetch(value + AHEAD * w + i);
        for (int64_t h = 0; h < s; h++) {
            const float weight = weights[h * c + j];
            float *mean = means + h * w;
#pragma omp simd
            for (int64_t i = 0; i < w; i++) mean[i] += weight * widen(value[i]);
        }
    }
}

// The output of a query head: the means of all parts, a part every `stride` numbers, and the state's, in their shares.
template <typename T>
void put_together(
    const Step &step, int64_t query_head, const float *means, int64_t parts, int64_t stride, const float *shares
) {
    const int64_t head = query_head / step.s, r = step.r, w = step.w, e = step.memory == SOFT_CENTROIDS ? w + step.d : w;
    T *output = static_cast<T *>(step.output) + query_head * w;
    for (int64_t i = 0; i < w; i++) {
        float sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += means[part * stride + i];
        sum *= shares[0];
        for (int64_t j = 0; j < r; j++) sum += shares[1 + j] * step.values_sum[(head * r + j) * e + i];
        narrow(sum, output[i]);
    }
}

// The centroid nearest to a pair, as `LayerCentroids` compares them; the first empty one, where there is any: with a pair
// equal to a centroid to the last bit, PyTorch's rounding decides between the two.
int64_t nearest_centroid(const Step &step, int64_t head, const float *key, const float *value) {
    const int64_t r = step.r, d = step.d, w = step.w;
    const float *counts = step.features_sum + head * r;
    const float *keys = step.keys_sum + head * r * d, *values = step.values_sum + head * r * w;
    float keys_squares = dot<0>(key, key, d), values_squares = dot<0>(value, value, w);
    for (int64_t j = 0; j < r; j++) {
        if (!(counts[j] > 0)) return j;
        keys_squares += step.squares_sum[head * r + j];
        values_squares += dot<0>(values + j * w, values + j * w, w) / counts[j];
    }
    const float ratio = keys_squares / std::max(values_squares, TINY); // ρ
    int64_t nearest = 0;
    float least = INFINITE;
    for (int64_t j = 0; j < r; j++) { // |x − c|² without |x|², which is the same for all
        const float *of_keys = keys + j * d, *of_values = values + j * w, count = counts[j];
        const float keys_distance = dot<0>(of_keys, of_keys, d) / count / count - 2 * dot<0>(key, of_keys, d) / count;
        const float values_distance = dot<0>(of_values, of_values, w) / count / count - 2 * dot<0>(value, of_values, w) / count;
        const float distance = keys_distance + ratio * values_distance;
        if (distance < least) least = distance, nearest = j;
    }
    return nearest;
}

// One KV head of one row, after attention with these weights, [s, c]: its scores, the victim, and what stays of that.
template <typename T> void evict(const Step &step, int64_t head, const float *weights) {
    const int64_t s = step.s, c = step.c, d = step.d, w = step.w, r = step.r, row = head / step.g, group = head % step.g;
    const T *keys = static_cast<const T *>(step.keys) + head * c * d;
    const T *values = static_cast<const T *>(step.values) + head * c * w;
    int32_t *positions = step.positions + head * c;
    float *scores = step.scores + head * c;
    const int32_t before = int32_t(step.seen[row]);
    const bool arrives = is_real(step, row);
    const int32_t seen = before + arrives;
    if (step.policy == H2O && arrives)
        for (int64_t h = 0; h < s; h++)
            for (int64_t j = 0; j < c; j++) scores[j] += weights[h * c + j];

    // Of the lowest scores that nothing protects, the oldest leaves. Padding leaves no trace.
    const int64_t first = step.counts[2 * row], recent = step.counts[2 * row + 1]; // first: heavy, or sinks
    const int64_t from = step.policy == SINK_RECENT ? first : 0;
    int64_t held = 0, victim = -1;
    for (int64_t j = 0; j < c; j++) {
        const int32_t position = positions[j];
        if (!arrives && position == before) positions[j] = -1;
        held += positions[j] >= 0;
        if (position < from || position >= seen - recent || positions[j] < 0) continue;
        const bool older = victim >= 0 && scores[j] == scores[victim] && position < positions[victim];
        if (victim < 0 || scores[j] < scores[victim] || older) victim = j;
    }
    const bool leaves = held > first + recent && victim >= 0;

    static thread_local std::vector<float> buffer;
    if (step.memory == CENTROIDS && leaves) {
        buffer.resize(d + w);
        float *key = buffer.data(), *value = key + d;
        for (int64_t i = 0; i < d; i++) key[i] = widen(keys[victim * d + i]);
        for (int64_t i = 0; i < w; i++) value[i] = widen(values[victim * w + i]);
        const int64_t joined = head * r + nearest_centroid(step, head, key, value);
        step.features_sum[joined] += 1;
        step.squares_sum[joined] += dot<0>(key, key, d);
        for (int64_t i = 0; i < d; i++) step.keys_sum[joined * d + i] += key[i];
        for (int64_t i = 0; i < w; i++) step.values_sum[joined * w + i] += value[i];
    } else if (step.memory == LOW_RANK || step.memory == SOFT_CENTROIDS) {
        const int64_t e = step.memory == SOFT_CENTROIDS ? w + d : w;
        float *sums = step.values_sum + head * r * e, *masses = step.features_sum + head * r;
        buffer.resize(r + step.m + d);
        float *features = buffer.data(), *hidden = features + r, *key = hidden + step.m;
        if (leaves) {
            for (int64_t i = 0; i < d; i++) key[i] = widen(keys[victim * d + i]);
            key_features(group, key, features, hidden, step);
        }
        for (int64_t j = 0; j < r; j++) {
            const float root = step.fading ? step.fading[group * r + j] : 0.0f, rate = root * root;
            const float stays = arrives ? std::exp(-rate) : 1.0f;
            const float weight = leaves ? features[j] * std::exp(rate * float(positions[victim] - seen)) : 0.0f;
            float *sum = sums + j * e;
            masses[j] = masses[j] * stays + weight;
            for (int64_t i = 0; i < e; i++) sum[i] *= stays;
            if (!leaves) continue;
            for (int64_t i = 0; i < w; i++) sum[i] += weight * widen(values[victim * w + i]);
            for (int64_t i = w; i < e; i++) sum[i] += weight * widen(keys[victim * d + i - w]);
        }
    }
    if (leaves) positions[victim] = -1;
}

// The phases of a step. A head's slots are shared out in parts where there are fewer heads than keep all threads busy.
template <typename T, int D> void run(const Step &step) {
    const int64_t heads = step.b * step.g, s = step.s, c = step.c, w = step.w, share_count = 1 + step.r;
    const int64_t parts = std::max<int64_t>(1, std::min((4 * step.threads + heads - 1) / heads, c / LEAST_PART));
    static thread_local std::vector<float> buffer;
    buffer.resize(heads * s * (c + share_count + parts * w));
    float *weights = buffer.data();                    // [b, g, s, c]
    float *shares = weights + heads * s * c;           // [b, g, s, 1 + r]
    float *means = shares + heads * s * share_count;   // [b, g, parts, s, w]
#pragma omp parallel num_threads(int(step.threads)) if (heads * parts > 1)
    {
#pragma omp for
        for (int64_t head = 0; head < heads; head++) write<T>(step, head);
#pragma omp for
        for (int64_t part = 0; part < heads * parts; part++) {
            const int64_t head = part / parts, index = part % parts;
            weigh<T, D>(step, head, index * c / parts, (index + 1) * c / parts, weights + head * s * c);
        }
#pragma omp for
        for (int64_t head = 0; head < heads * s; head++)
            normalise<T>(step, head, weights + head * c, shares + head * share_count);
#pragma omp for
        for (int64_t part = 0; part < heads * parts; part++) {
            const int64_t head = part / parts, index = part % parts;
            const float *of_head = weights + head * s * c;
            average<T, D>(step, head, index * c / parts, (index + 1) * c / parts, of_head, means + part * s * w);
        }
#pragma omp for
        for (int64_t head = 0; head < heads; head++) {
            for (int64_t h = 0; h < s; h++) {
                const float *of_head = means + (head * parts * s + h) * w;
                put_together<T>(step, head * s + h, of_head, parts, s * w, shares + (head * s + h) * share_count);
            }
            evict<T>(step, head, weights + head * s * c);
        }
    }
    for (int64_t row = 0; row < step.b; row++) {
        const bool arrives = is_real(step, row);
        step.settled[row] |= step.seen[row] > 0 && arrives;
        step.seen[row] += arrives;
    }
}

template <typename T> void run(const Step &step) {
    const int64_t d = step.d == step.w ? step.d : 0;
    (d == 64 ? run<T, 64> : d == 128 ? run<T, 128> : run<T, 0>)(step);
}

} // namespace

extern "C" void less_step(const Step *step) { step->dtype == FLOAT32 ? run<float>(*step) : run<bfloat16>(*step); }
