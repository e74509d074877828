// A decoding step of one layer, as `bridge.py` hands it over.
//
// Axes: b rows, g KV heads, s query heads per KV head, c slots of a KV head, N slots of all heads, d head dim, w width of
// values, e width of what the state sums, r virtual tokens, m hidden size, f counts of the policy. Tensors lie dense, in this
// order. `layout.py` says the numbers of types, policies and memories, and all constants that Python has too.

#pragma once

#include <cstdint>

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
    int64_t b, g, s, n, d, w, e, r, m, threads;    // n: N
    int64_t counts_of_row, counts_of_head;         // numbers from one row's counts to the next one's, and from head to head
    int32_t dtype, policy, memory;
    float scaling, softcap;                        // softcap 0: none
    const void *query;                             // [b, g, s, d]
    const void *key;                               // [b, g, d]
    const void *value;                             // [b, g, w]
    const bool *real;                              // [b], which tokens are not padding, or null: all
    const float *sinks;                            // [g, s], or null
    const int64_t *starts;                         // [b·g + 1], where the slots of each KV head begin, or null: all have as many
    void *keys;                                    // [N, d], in place, as all below but the counts and weights
    void *values;                                  // [N, w]
    int32_t *positions;                            // [N], -1: empty
    float *scores;                                 // [N]
    float *bias;                                   // [N], or null
    int64_t *seen;                                 // [b]
    bool *settled;                                 // [b]
    const int64_t *counts;                         // [b, f] or [b, g, f]
    float *values_sum;                             // [b, g, r, e]
    float *features_sum;                           // [b, g, r], or how many tokens untrained centroids have
    float *keys_sum;                               // [b, g, r, d] of untrained centroids
    float *squares_sum;                            // [b, g, r] of untrained centroids
    Network query_network;                         // of g·s heads
    Network key_network;                           // of g heads
    const float *fading;                           // [g, r], √λ, or null
    const float *limit;                            // [g, r], log L, or null
    void *output;                                  // [b, g, s, w]
};

static_assert(sizeof(Step) == BYTES_OF_STEP, "`layout.py` has the same fields");

// Where the slots of a KV head, out of b·g, begin among all.
inline int64_t begin_of(const Step &step, int64_t head) {
    return step.starts ? step.starts[head] : step.n / (step.b * step.g) * head;
}

inline int64_t size_of(const Step &step, int64_t head) { return begin_of(step, head + 1) - begin_of(step, head); }

inline bool is_real(const Step &step, int64_t row) { return !step.real || step.real[row]; }
