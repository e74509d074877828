// What the memories do for one KV head, out of b·g: `less_cache.memory` in C++. φ and ψ, attention to virtual tokens, and what
// becomes of the state when tokens leave.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "step.h"
#include "vector_math.h"

// g(g(x W1) W2), what φ and ψ of the low-rank state begin with.
inline void low_rank_features(
    const Network &of, int64_t head, const float *x, float *features, float *hidden, const Step &step
) {
    const int64_t d = step.d, m = step.m, r = step.r;
    std::fill(hidden, hidden + m, 0.0f);
    std::fill(features, features + r, 0.0f);
    add_product(x, of.w1 + head * d * m, hidden, d, m);
    gelu(hidden, m);
    add_product(hidden, of.w2 + head * m * r, features, m, r);
    gelu(features, r);
}

// a(x) of the centroids: GELU(x W1 + b1) W2 + x W3 + b2 of x over its root mean square, which overwrites x.
inline void centroid_features(const Network &of, int64_t head, float *x, float *features, float *hidden, const Step &step) {
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
inline void key_features(int64_t head, float *key, float *features, float *hidden, const Step &step) {
    const Network &of = step.key_network;
    const int64_t r = step.r;
    if (step.memory == MEMORY_SOFT_CENTROIDS) {
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

inline float cap(float logit, float softcap) { return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit; }

// Shares of one query head's attention: that of the kept tokens, of which largest + log(mass) is the log-sum-exp, and for each
// virtual token its own over its mass, which are the factors of what the state sums. [1 + r]
inline void share_attention(
    const Step &step, int64_t head, int64_t group_head, const float *query, float largest, float mass, float *shares
) {
    const int64_t r = step.r, d = step.d, w = step.w, e = step.e;
    const float *sums = step.values_sum + head * r * e, *masses = step.features_sum + head * r;
    float *logits = shares + 1;
    static thread_local std::vector<float> buffer;
    buffer.resize(step.m + d);
    float *hidden = buffer.data(), *x = hidden + step.m;
    std::copy(query, query + d, x);
    if (step.memory == MEMORY_CENTROIDS) {
        const float squared = dot<0>(query, query, d) * step.scaling * step.scaling;
        for (int64_t j = 0; j < r; j++) {
            const float count = std::max(masses[j], 1.0f), *keys = step.keys_sum + (head * r + j) * d;
            const float mean_square = step.squares_sum[head * r + j] / count;
            const float variance = std::max(mean_square - dot<0>(keys, keys, d) / count / count, 0.0f) / float(d);
            logits[j] = cap(dot<0>(query, keys, d) * step.scaling / count, step.softcap);
            logits[j] += std::min(SPREAD * squared * variance, MOST_SPREAD);
        }
    } else if (step.memory == MEMORY_SOFT_CENTROIDS) {
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

// The centroid nearest to a pair, as `LayerCentroids` compares them; the first empty one, where there is any: with a pair
// equal to a centroid to the last bit, PyTorch's rounding decides between the two.
inline int64_t nearest_centroid(const Step &step, int64_t head, const float *key, const float *value) {
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

// A pair joins the nearest untrained centroid.
inline void join(const Step &step, int64_t head, const float *key, const float *value) {
    const int64_t d = step.d, w = step.w, joined = head * step.r + nearest_centroid(step, head, key, value);
    step.features_sum[joined] += 1;
    step.squares_sum[joined] += dot<0>(key, key, d);
    for (int64_t i = 0; i < d; i++) step.keys_sum[joined * d + i] += key[i];
    for (int64_t i = 0; i < w; i++) step.values_sum[joined * w + i] += value[i];
}

inline float fading_rate(const Step &step, int64_t head, int64_t j) {
    const float root = step.fading[head % step.g * step.r + j];
    return root * root;
}

// One more token: the sums of a trained memory fade.
inline void fade(const Step &step, int64_t head) {
    const int64_t r = step.r, e = step.e;
    for (int64_t j = 0; j < r; j++) {
        const float stays = std::exp(-fading_rate(step, head, j));
        float *sum = step.values_sum + (head * r + j) * e;
        step.features_sum[head * r + j] *= stays;
        for (int64_t i = 0; i < e; i++) sum[i] *= stays;
    }
}

// A pair of so many tokens ago joins the sums of a trained memory.
inline void add(const Step &step, int64_t head, const float *key, const float *value, float age) {
    const int64_t r = step.r, d = step.d, w = step.w, e = step.e;
    static thread_local std::vector<float> buffer;
    buffer.resize(r + step.m + d);
    float *features = buffer.data(), *hidden = features + r, *x = hidden + step.m;
    std::copy(key, key + d, x);
    key_features(head % step.g, x, features, hidden, step);
    for (int64_t j = 0; j < r; j++) {
        const float weight = step.fading ? features[j] * std::exp(-age * fading_rate(step, head, j)) : features[j];
        float *sum = step.values_sum + (head * r + j) * e;
        step.features_sum[head * r + j] += weight;
        for (int64_t i = 0; i < w; i++) sum[i] += weight * value[i];
        for (int64_t i = w; i < e; i++) sum[i] += weight * key[i - w];
    }
}

// The state after a step of a row that has seen so many tokens now: it fades, and the tokens in these slots are folded in.
template <typename T>
void remember(const Step &step, int64_t head, int64_t seen, const std::vector<int64_t> &victims) {
    const int64_t begin = begin_of(step, head), d = step.d, w = step.w;
    if (step.memory == MEMORY_NONE) return;
    if (step.fading && is_real(step, head / step.g)) fade(step, head);
    static thread_local std::vector<float> buffer;
    buffer.resize(d + w);
    float *key = buffer.data(), *value = key + d;
    for (int64_t slot : victims) {
        const T *kept_key = static_cast<const T *>(step.keys) + (begin + slot) * d;
        const T *kept_value = static_cast<const T *>(step.values) + (begin + slot) * w;
        for (int64_t i = 0; i < d; i++) key[i] = widen(kept_key[i]);
        for (int64_t i = 0; i < w; i++) value[i] = widen(kept_value[i]);
        if (step.memory == MEMORY_CENTROIDS)
            join(step, head, key, value);
        else
            add(step, head, key, value, float(seen - step.positions[begin + slot]));
    }
}
