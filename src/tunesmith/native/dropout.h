/* Places that fall in a row of independent trials. The mathematics stands in models/kernels/dropout.py. */

/* ln x for x > 0 that is neither subnormal nor infinite: x = m 2^e with m around 1, and the series of atanh for
   ln m = 2 atanh((m - 1) / (m + 1)), whose rest lies below half a unit in the last place. */
static inline float log_float(float x)
{
    unsigned bits, mantissa;
    float m;
    memcpy(&bits, &x, sizeof bits);
    mantissa = (bits & 0x7fffff) | 0x3f800000;
    memcpy(&m, &mantissa, sizeof m);
    int halved = m > 1.41421356f;
    m = halved ? 0.5f * m : m;
    float e = (float)((int)(bits >> 23) - 127 + halved), s = (m - 1) / (m + 1), q = s * s;
    float series = 2 * s * (1 + q * (1.0f / 3 + q * (1.0f / 5 + q * (1.0f / 7 + q * (1.0f / 9)))));
    return e * 0.693359375f + (series - e * 2.12194440e-4f);
}

/* count ascending places above last, whose gaps are 1 + floor(factor ln u), u uniform in (0, 1]. Random numbers are
   those of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"). */
void draw_places(long seed, long last, double factor, long *places, long count, long threads)
{
    enum { BLOCK = 256 };
    float gaps[BLOCK];
    (void)threads;
    for (long begin = 0; begin < count; begin += BLOCK) {
        long some = begin + BLOCK < count ? BLOCK : count - begin;
#pragma omp simd
        for (long i = 0; i < some; i++) {
            unsigned long long r = (unsigned long long)seed + (unsigned long long)(begin + i + 1) * 0x9e3779b97f4a7c15;
            r = (r ^ (r >> 30)) * 0xbf58476d1ce4e5b9;
            r = (r ^ (r >> 27)) * 0x94d049bb133111eb;
            r ^= r >> 31;
            float u = (float)(int)((r >> 40) + 1) * 0x1p-24f;
            gaps[i] = (float)factor * log_float(u);
        }
        for (long i = 0; i < some; i++) {
            last += 1 + (long)gaps[i];
            places[begin + i] = last;
        }
    }
}
