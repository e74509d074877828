// A decoding step of one layer on a processor, in one call: what `backends.torch.step` does. `bridge.py` calls it.
//
// Axes: as in `step.h`. A head's weights over its slots, [s, c], lie where its slots do: from s · begin on.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "memories.h"
#include "policies.h"
#include "step.h"
#include "vector_math.h"

namespace {

const int64_t LEAST_SLOTS = 32; // of a thread
const int64_t AHEAD = 12;       // slots that are fetched before their turn

// Some slots of a KV head, which one thread goes through.
struct Part {
    int64_t head, from, to;
};

// One KV head of one row: the new token goes into an empty slot.
template <typename T> void write(const Step &step, int64_t head) {
    const int64_t begin = begin_of(step, head), d = step.d, w = step.w;
    const T *key = static_cast<const T *>(step.key) + head * d, *value = static_cast<const T *>(step.value) + head * w;
    int32_t *positions = step.positions + begin;
    const int64_t slot = begin + (std::min_element(positions, positions + size_of(step, head)) - positions);
    std::copy(key, key + d, static_cast<T *>(step.keys) + slot * d);
    std::copy(value, value + w, static_cast<T *>(step.values) + slot * w);
    step.positions[slot] = int32_t(step.seen[head / step.g]);
    step.scores[slot] = arrival(step, step.positions[slot]);
    if (step.bias) step.bias[slot] = 0;
}

// Logits of some slots of a KV head, for its query heads: weights [s, c].
template <typename T, int D> void weigh(const Step &step, const Part &part, float *weights) {
    const int64_t begin = begin_of(step, part.head), c = size_of(step, part.head), s = step.s, d = known<D>(step.d);
    const T *keys = static_cast<const T *>(step.keys) + begin * d;
    const T *given = static_cast<const T *>(step.query) + part.head * s * d;
    static thread_local Buffer buffer;
    float *queries = buffer.of_size(s * d);
    for (int64_t i = 0; i < s * d; i++) queries[i] = widen(given[i]) * step.scaling;
    for (int64_t j = part.from; j < part.to; j++) {
        const bool is_empty = step.positions[begin + j] < 0;
        const float bias = step.bias ? step.bias[begin + j] : 0.0f;
        for (int64_t i = 0; i < d; i += 64 / sizeof(T)) __builtin_prefetch(keys + (j + AHEAD) * d + i);
        for (int64_t h = 0; h < s; h++) {
            const float logit = cap(dot<D>(queries + h * d, keys + j * d, d), step.softcap) + bias;
            weights[h * c + j] = is_empty ? -INFINITE : logit;
        }
    }
}

// Softmax of a query head's logits over the kept tokens, in place, [c], and its shares.
template <typename T> void normalise(const Step &step, int64_t query_head, float *weights, float *shares) {
    const int64_t head = query_head / step.s, group_head = query_head % (step.g * step.s), d = step.d;
    const int64_t c = size_of(step, head);
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
    if (step.memory == MEMORY_NONE) return;
    static thread_local std::vector<float> query;
    query.resize(d);
    const T *given = static_cast<const T *>(step.query) + query_head * d;
    for (int64_t i = 0; i < d; i++) query[i] = widen(given[i]);
    share_attention(step, head, group_head, query.data(), largest, mass, shares);
}

// Weighted values of some slots of a KV head, for its query heads: means [s, w].
template <typename T, int D> void average(const Step &step, const Part &part, const float *weights, float *means) {
    const int64_t begin = begin_of(step, part.head), c = size_of(step, part.head), s = step.s, w = known<D>(step.w);
    const T *values = static_cast<const T *>(step.values) + begin * w;
    std::fill(means, means + s * w, 0.0f);
    for (int64_t j = part.from; j < part.to; j++) {
        if (step.positions[begin + j] < 0) continue; // what is left there may be NaN
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
    const int64_t head = query_head / step.s, r = step.r, w = step.w, e = step.e;
    T *output = static_cast<T *>(step.output) + query_head * w;
    for (int64_t i = 0; i < w; i++) {
        float sum = 0;
        for (int64_t part = 0; part < parts; part++) sum += means[part * stride + i];
        sum *= shares[0];
        for (int64_t j = 0; j < r; j++) sum += shares[1 + j] * step.values_sum[(head * r + j) * e + i];
        narrow(sum, output[i]);
    }
}

// One KV head of one row, after attention with these weights, [s, c]: its scores, who leaves, and what stays of them. Padding
// leaves no trace.
template <typename T> void evict(const Step &step, int64_t head, const float *weights) {
    const int64_t row = head / step.g, before = step.seen[row], seen = before + is_real(step, row);
    int32_t *positions = step.positions + begin_of(step, head);
    static thread_local std::vector<int64_t> victims;
    if (!is_real(step, row)) std::replace(positions, positions + size_of(step, head), int32_t(before), int32_t(-1));
    observe(step, head, weights);
    choose_victims(step, head, seen, victims);
    remember<T>(step, head, seen, victims);
    for (int64_t slot : victims) positions[slot] = -1;
}

// Every thread goes through as many slots as the others, wherever heads begin: some of a head, or several heads.
struct Work {
    std::vector<Part> parts;            // in the order of slots
    std::vector<int64_t> turns, firsts; // the first part of each thread, and of each head; then how many parts there are
};

void share_out(const Step &step, Work &work) {
    const int64_t n = step.n, threads = std::max<int64_t>(1, std::min(step.threads, n / LEAST_SLOTS));
    work.parts.clear();
    work.turns.assign(1, 0);
    work.firsts.assign(1, 0);
    for (int64_t head = 0; head < step.b * step.g; head++) {
        const int64_t begin = begin_of(step, head), end = begin + size_of(step, head);
        for (int64_t from = begin, to; from < end; from = to) {
            const int64_t turn_ends = int64_t(work.turns.size()) * n / threads;
            to = std::min(end, turn_ends);
            work.parts.push_back({head, from - begin, to - begin});
            if (to == turn_ends) work.turns.push_back(work.parts.size());
        }
        work.firsts.push_back(work.parts.size());
    }
}

// The phases of a step.
template <typename T, int D> void run(const Step &step) {
    const int64_t heads = step.b * step.g, s = step.s, w = step.w, share_count = 1 + step.r;
    static thread_local Work work;
    static thread_local Buffer buffer;
    share_out(step, work);
    const Part *parts = work.parts.data();
    const int64_t *turns = work.turns.data(), *firsts = work.firsts.data(), turn_count = work.turns.size() - 1;
    const int64_t of_part = (s * w + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; // no two threads write into the same cache line
    float *means = buffer.of_size(firsts[heads] * of_part + s * step.n + heads * s * share_count);
    float *weights = means + firsts[heads] * of_part; // of each head [s, c]
    float *shares = weights + s * step.n;             // [b, g, s, 1 + r]
#pragma omp parallel num_threads(int(step.threads)) if (firsts[heads] > 1)
    {
#pragma omp for
        for (int64_t head = 0; head < heads; head++) write<T>(step, head);
#pragma omp for schedule(static, 1)
        for (int64_t turn = 0; turn < turn_count; turn++)
            for (int64_t part = turns[turn]; part < turns[turn + 1]; part++)
                weigh<T, D>(step, parts[part], weights + s * begin_of(step, parts[part].head));
#pragma omp for
        for (int64_t query_head = 0; query_head < heads * s; query_head++) {
            const int64_t head = query_head / s, h = query_head % s;
            float *of_head = weights + s * begin_of(step, head) + h * size_of(step, head);
            normalise<T>(step, query_head, of_head, shares + query_head * share_count);
        }
#pragma omp for schedule(static, 1)
        for (int64_t turn = 0; turn < turn_count; turn++)
            for (int64_t part = turns[turn]; part < turns[turn + 1]; part++)
                average<T, D>(step, parts[part], weights + s * begin_of(step, parts[part].head), means + part * of_part);
#pragma omp for
        for (int64_t head = 0; head < heads; head++) {
            const int64_t count = firsts[head + 1] - firsts[head];
            for (int64_t h = 0; h < s; h++) {
                const int64_t query_head = head * s + h;
                const float *first = means + firsts[head] * of_part + h * w;
                put_together<T>(step, query_head, first, count, of_part, shares + query_head * share_count);
            }
            evict<T>(step, head, weights + s * begin_of(step, head));
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

// Whether heads of different sizes lie one after the other, within the tensors, and each has a slot.
bool is_sound(const Step &step) {
    const int64_t heads = step.b * step.g;
    if (heads < 1 || begin_of(step, 0) != 0 || begin_of(step, heads) != step.n) return false;
    for (int64_t head = 0; head < heads; head++)
        if (size_of(step, head) < 1) return false;
    return true;
}

} // namespace

// Whether the step was taken; if not, nothing has changed.
extern "C" bool less_step(const Step *step) {
    if (!is_sound(*step)) return false;
    step->dtype == DTYPE_FLOAT32 ? run<float>(*step) : run<bfloat16>(*step);
    return true;
}
