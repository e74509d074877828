// What both parts of the C++ form compute with.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

const float INFINITE = std::numeric_limits<float>::infinity();

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
