// Keys and values in codes, read as they lie: `slots.formats` and `slots.coding` in C++.
//
//     key = turn(center + H (scale · level[code]), by its position)     value = H (scale · level[code])
//
// H, the Hadamard matrices, is linear: values are summed before it. Keys are decoded LANES at a time, side by side: a tile has
// number i of all of them in one vector. So H and RoPE are additions and products of whole vectors, whatever the pairs are.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vector_math.h"

#ifdef __AVX512F__
const int64_t LANES = 16;
#else
const int64_t LANES = 8;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef uint32_t Bits __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(float))));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <typename To, typename From> inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Vector load(const float *from) {
    Vector vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(Vector vector, float *to) { std::memcpy(to, &vector, sizeof vector); }

inline Vector all(float x) { return Vector{} + x; }

// The levels of 4-bit codes; only the last four bits of each code count.
struct Table {
#if defined(__AVX512F__)
    __m512 levels;
    explicit Table(const float *of) : levels(_mm512_loadu_ps(of)) {}
    Vector operator[](Bits codes) const { return as<Vector>(_mm512_permutexvar_ps(as<__m512i>(codes), levels)); }
#elif defined(__AVX2__)
    __m256 low, high;
    explicit Table(const float *of) : low(_mm256_loadu_ps(of)), high(_mm256_loadu_ps(of + 8)) {}
    Vector operator[](Bits codes) const {
        const __m256i at = as<__m256i>(codes);
        const __m256 is_high = as<__m256>(codes << 28);
        return as<Vector>(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), is_high));
    }
#else
    const float *levels;
    explicit Table(const float *of) : levels(of) {}
    Vector operator[](Bits codes) const {
        Vector numbers;
        for (int64_t lane = 0; lane < LANES; lane++) numbers[lane] = levels[codes[lane] & 15];
        return numbers;
    }
#endif
};

// 8-bit codes have levels of equal distance.
struct Line {
    float first, distance;
    explicit Line(const float *levels) : first(levels[0]), distance(levels[1] - levels[0]) {}
    Vector operator[](Bits codes) const { return __builtin_convertvector(as<Integers>(codes), Vector) * distance + first; }
};

template <int FORMAT> using Levels = std::conditional_t<FORMAT == FORMAT_INT4, Table, Line>;

template <int FORMAT> inline int64_t bytes_of(int64_t d) { return FORMAT == FORMAT_INT4 ? d / 2 : d; }

inline int64_t groups_of(int64_t d) { return (d + GROUP - 1) / GROUP; }

// The largest power of two that divides d, of which H is made.
inline int64_t hadamard_size(int64_t d) { return d & -d; }

// Some slots of a KV head, side by side. Where there are fewer than LANES, the last one stands for those that are missing.
struct Tile {
    int64_t at[LANES];        // among all slots
    int32_t positions[LANES]; // -1: nothing is there
};

// Four bytes of every slot from its byte `from` on.
inline Bits words(const uint8_t *codes, int64_t bytes, const Tile &tile, int64_t from) {
    uint32_t found[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) std::memcpy(found + lane, codes + tile.at[lane] * bytes + from, 4);
    Bits bits;
    std::memcpy(&bits, found, sizeof bits);
    return bits;
}

// The levels of the codes times `scales` [groups]: numbers [d].
template <int FORMAT, int D>
inline void decode(
    const uint8_t *codes, const Levels<FORMAT> &levels, const Tile &tile, const Vector *scales, int64_t given, Vector *numbers
) {
    const int64_t d = known<D>(given), half = d / 2, bytes = bytes_of<FORMAT>(d);
    for (int64_t i = 0; i < bytes; i += 4) {
        const Bits four = words(codes, bytes, tile, i);
#pragma GCC unroll 4
        for (int64_t k = 0; k < 4; k++) {
            const Bits code = four >> (8 * k);
            if (FORMAT == FORMAT_INT8) {
                numbers[i + k] = levels[code & 255] * scales[(i + k) / GROUP];
            } else {
                numbers[i + k] = levels[code] * scales[(i + k) / GROUP];
                numbers[half + i + k] = levels[code >> 4] * scales[(half + i + k) / GROUP];
            }
        }
    }
}

// Sums and differences of numbers at a distance, log2(RADIX) times.
template <int RADIX, typename Number> inline void butterflies(Number *numbers, int64_t size, int64_t distance) {
    for (int64_t block = 0; block < size; block += RADIX * distance)
        for (int64_t i = block; i < block + distance; i++) {
            Number held[RADIX];
#pragma GCC unroll 8
            for (int64_t k = 0; k < RADIX; k++) held[k] = numbers[i + k * distance];
#pragma GCC unroll 3
            for (int64_t apart = 1; apart < RADIX; apart *= 2)
#pragma GCC unroll 8
                for (int64_t k = 0; k < RADIX; k++)
                    if (!(k & apart)) {
                        const Number sum = held[k] + held[k + apart];
                        held[k + apart] = held[k] - held[k + apart];
                        held[k] = sum;
                    }
#pragma GCC unroll 8
            for (int64_t k = 0; k < RADIX; k++) numbers[i + k * distance] = held[k];
        }
}

// H times numbers [d], times the square root of its size.
template <int D, typename Number> inline void hadamard(Number *numbers, int64_t given) {
    const int64_t d = known<D>(given), size = hadamard_size(d);
    int64_t distance = 1;
    for (; distance * 8 <= size; distance *= 8) butterflies<8>(numbers, d, distance);
    if (distance * 4 <= size) butterflies<4>(numbers, d, distance), distance *= 4;
    if (distance * 2 <= size) butterflies<2>(numbers, d, distance);
}

// Sine and cosine, to 2e-7 of small angles and 3e-6 at 100,000: Cephes' polynomials, after π/2 in three parts.
inline void sine_and_cosine(Vector angle, Vector &sine, Vector &cosine) {
    const float magic = 12582912.0f; // 1.5 · 2^23: adding it rounds to an integer, which is in the last bits
    const Vector shifted = angle * 0.636619772f + magic, quarters = shifted - magic;
    const Vector x = angle - quarters * 1.5703125f - quarters * 4.837512969970703125e-4f - quarters * 7.54978995489188216e-8f;
    const Vector square = x * x;
    const Vector s = x + x * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - square * 1.9515295891e-4f));
    const Vector c = 1.0f - 0.5f * square
                     + square * square * (4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f));
    const Bits turn = as<Bits>(shifted), is_odd = -(turn & 1);
    const Bits swapped = (as<Bits>(s) ^ as<Bits>(c)) & is_odd;
    sine = as<Vector>(as<Bits>(s) ^ swapped ^ ((turn << 30) & 0x80000000u));
    cosine = as<Vector>(as<Bits>(c) ^ swapped ^ (((turn + 1) << 30) & 0x80000000u));
}
