// What the policies say of one KV head, out of b·g: `less_cache.policies` in C++.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "step.h"
#include "vector_math.h"

// The first score of a token at this position.
inline float arrival(const Step &step, int32_t position) { return step.policy == POLICY_CORM ? float(position - 1) : 0.0f; }

// The head's scores after its query heads have attended to its slots with these weights, [s, c].
inline void observe(const Step &step, int64_t head, const float *weights) {
    const int64_t begin = begin_of(step, head), c = size_of(step, head), s = step.s, row = head / step.g;
    float *scores = step.scores + begin;
    if (step.policy == POLICY_H2O && is_real(step, row)) {
        for (int64_t h = 0; h < s; h++)
            for (int64_t j = 0; j < c; j++) scores[j] += weights[h * c + j];
    }
    if (step.policy == POLICY_CORM) { // important to any of the query heads; padding finds nothing so
        const float at = float(step.seen[row]), threshold = is_real(step, row) ? 1.0f / (at + 1.0f) : INFINITE;
        for (int64_t h = 0; h < s; h++)
            for (int64_t j = 0; j < c; j++) scores[j] = std::max(scores[j], weights[h * c + j] >= threshold ? at : -1.0f);
    }
}

// The head's slots that must become empty, now that its row has seen so many tokens. Where there is a budget it is one at most:
// of the lowest scores that nothing protects, the oldest. Without a budget any number of tokens may leave.
inline void choose_victims(const Step &step, int64_t head, int64_t seen, std::vector<int64_t> &victims) {
    const int64_t begin = begin_of(step, head), c = size_of(step, head);
    const int32_t *positions = step.positions + begin;
    const float *scores = step.scores + begin;
    // (heavy, recent) of H2O, (sinks, recent) of sinks + recent, (window, recent) of CORM
    const int64_t *counts = step.counts + head / step.g * step.counts_of_row + head % step.g * step.counts_of_head;
    const int64_t first = counts[0], recent = counts[1];
    victims.clear();
    if (step.policy == POLICY_CORM) {
        for (int64_t j = 0; j < c; j++) {
            const bool stays = positions[j] < 0 || positions[j] >= seen - recent || scores[j] >= float(seen - first);
            if (!stays) victims.push_back(j);
        }
        return;
    }
    const int64_t sinks = step.policy == POLICY_SINK_RECENT ? first : 0;
    int64_t held = 0, victim = -1;
    for (int64_t j = 0; j < c; j++) {
        const int32_t position = positions[j];
        held += position >= 0;
        if (position < sinks || position >= seen - recent || position < 0) continue;
        const bool older = victim >= 0 && scores[j] == scores[victim] && position < positions[victim];
        if (victim < 0 || scores[j] < scores[victim] || older) victim = j;
    }
    if (held > first + recent && victim >= 0) victims.push_back(victim);
}
