// What all parts of the C++ form compute with.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

const int64_t CACHE_LINE = 16; // floats
const float INFINITE = std::numeric_limits<float>::infinity();
const float TINY = std::numeric_limits<float>::min();

// Room for numbers, from the start of a cache line on: a vector register that lies in two of them takes twice as long to load.
// What is in it at first means nothing.
class Buffer {
    std::vector<float> numbers;

  public:
    float *of_size(int64_t size) {
        if (int64_t(numbers.size()) < size + CACHE_LINE) numbers.resize(size + CACHE_LINE);
        const uintptr_t line = CACHE_LINE * sizeof(float), address = reinterpret_cast<uintptr_t>(numbers.data());
        return reinterpret_cast<float *>((address + line - 1) / line * line);
    }
};

// bfloat16 is the first half of a float's bits.
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

// Half precision: 5 bits of exponent, 10 of fraction.
struct float16 {
    uint16_t bits;
};

inline float widen(float16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t up = 239u << 23; // 2^112, what the exponents differ by
    float magnitude, factor;
    std::memcpy(&magnitude, &rest, sizeof rest);
    std::memcpy(&factor, &up, sizeof up);
    magnitude *= factor;
    uint32_t bits;
    std::memcpy(&bits, &magnitude, sizeof bits);
    bits |= sign | (rest >= 0x0f800000 ? 0x7f800000 : 0); // infinite, or no number
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float x, float16 &to) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t narrowed;
    if (rest > 0x7f800000) narrowed = 0x7e00;
    else if (rest >= 0x477ff000) narrowed = 0x7c00; // too large
    else if (rest >= 0x38800000) narrowed = (rest + 0xfff + ((rest >> 13) & 1) - (112u << 23)) >> 13; // nearest, ties to even
    else { // in steps of 2^-24, as of 1/2
        float magnitude;
        std::memcpy(&magnitude, &rest, sizeof rest);
        magnitude += 0.5f;
        std::memcpy(&narrowed, &magnitude, sizeof narrowed);
        narrowed -= 0x3f000000;
    }
    to.bits = uint16_t(sign | narrowed);
}

// e^x to 2e-7 of itself, 0 below -87: a form that compilers vectorise, which std::exp is not.
inline float fast_exp(float x) {
    const float low = -87.0f, magic = 12582912.0f; // 1.5 · 2^23: adding it rounds to an integer
    float clamped = x < low ? low : x > 88.0f ? 88.0f : x;
    float shifted = clamped * 1.44269504f + magic;
    float n = shifted - magic;
    float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t exponent = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < low ? 0.0f : x > 88.0f ? INFINITE : x != x ? x : p * power;
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
