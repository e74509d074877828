// Attention of one token a row to what a policy that chooses in blocks holds, as `attending.py` hands it over.
//
// Axes: b rows, g KV heads, s query heads per KV head, N slots of all heads, e newest tokens, d head dim, w width of values, r
// virtual tokens, p pairs of numbers that RoPE turns. Tensors lie dense, in this order.

#pragma once

#include <cstdint>

#include "vector_math.h"

struct Attend {
    int64_t b, g, s, n, e, d, w, r, p, threads;   // n: N
    int32_t dtype, newest_dtype, bias_dtype;      // DTYPE_*
    int32_t format, state;                        // FORMAT_*, STATE_*
    float scaling, softcap;                       // softcap 0: none
    const void *query;                            // [b, g, s, d]
    const void *key;                              // [b, g, d]
    const void *value;                            // [b, g, w]
    const float *sinks;                           // [g, s], or null
    const int64_t *starts;                        // [b·g + 1], where the slots of each KV head begin, or null: all have as many
    const int32_t *positions;                     // [N], -1: empty
    const void *bias;                             // [N], or null
    const void *keys;                             // [N, d], or codes: [N, d] bytes, or [N, d/2]
    const void *values;                           // [N, w], or codes
    const float16 *key_scales;                    // [N, d/GROUP], rounded up
    const float16 *value_scales;                  // [N, w/GROUP]
    const float *levels;                          // of the codes
    const float16 *centers;                       // [b, g, d], or null
    const float16 *first_keys;                    // [b, g, d], or null: the first token lies in codes alone
    const float16 *first_values;                  // [b, g, w]
    const int32_t *pairs;                         // [2, p], numbers of a key that turn with each other
    const float *angles;                          // [p], radians a token
    const float *gains;                           // [p], ±1, of the first of each pair; the second has the other sign
    const void *newest_keys;                      // [b, g, e, d]
    const void *newest_values;                    // [b, g, e, w]
    const int32_t *newest_positions;              // [b, e], -1: padding
    const uint8_t *newest_codes;                  // [b, g, s, e, d/4], rounded up, of their queries
    const float16 *newest_scales;                 // [b, g, s, e]
    const float *query_levels;                    // of the queries' codes
    const bool *real;                             // [b], which tokens are not padding, or null: all
    int64_t *seen;                                // [b], in place
    bool *settled;                                // [b], in place
    void *taken_keys;                             // [b, g, e + 1, d], the newest ones and the new one; null: it is not taken in
    void *taken_values;                           // [b, g, e + 1, w]
    int32_t *taken_positions;                     // [b, e + 1]
    uint8_t *taken_codes;                         // [b, g, s, e + 1, d/4]
    float16 *taken_scales;                        // [b, g, s, e + 1]
    const float *counts;                          // [b, g, r], tokens of each centroid; or logits of the state, [b, g, s, r]
    const void *state_keys;                       // [b, g, r, d], sums, or means in 16 bits
    const void *state_values;                     // [b, g, r, w], sums, or means in 16 bits; or means
    const float *spreads;                         // [b, g, r], sums of |k|², or their variance
    void *output;                                 // [b, g, s, w]
};

static_assert(sizeof(Attend) == BYTES_OF_ATTEND, "`layout.py` has the same fields");
