/* Vectors of 64 bytes by the compilers' own extension: one AVX-512 register, two of AVX2, four of NEON or SSE. */
#ifndef TUNESMITH_VECTORS_H
#define TUNESMITH_VECTORS_H

#include <string.h>

typedef float float_vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef double double_vector __attribute__((vector_size(64), aligned(8), may_alias));

/* e^x by x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial of r (Cody & Waite 1980, "Software Manual for the
   Elementary Functions"; coefficients of e^r are those of Taylor's series, whose rest lies below half a unit in the
   last place). n is taken by adding and subtracting 1.5 times 2^(bits of the fraction). Below the least normal number
   the result is 0. No branches, so that loops around it become vectors. */
static inline float exp_float(float x)
{
    const float shift = 12582912.0f;
    x = x < -87.0f ? -87.5f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + shift) - shift;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    int bits = ((int)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x <= -87.0f ? 0.0f : p * power;
}

static inline double exp_double(double x)
{
    const double shift = 6755399441055744.0;
    x = x < -708.0 ? -708.5 : x;
    x = x > 709.0 ? 709.0 : x;
    double n = (x * 1.4426950408889634 + shift) - shift;
    double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 6227020800;
    const double factorials[] = {479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2, 1, 1};
    for (int i = 0; i < 13; i++)
        p = p * r + 1.0 / factorials[i];
    long bits = ((long)n + 1023) << 52;
    double power;
    memcpy(&power, &bits, sizeof power);
    return x <= -708.0 ? 0.0 : p * power;
}

#endif
