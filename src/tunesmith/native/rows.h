/* Row by row: norm, rotation, gated activation. Included once for each REAL. */

/* Zeros at those of count ascending places of a contiguous matrix that lie in some rows of it. */
static void NAME(drop)(REAL *x, const long *places, long count, long begin, long end)
{
    long low = 0, high = count;
    while (low < high) {
        long middle = (low + high) / 2;
        if (places[middle] < begin)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < count && places[low] < end; low++)
        x[places[low]] = 0;
}

/* out = x r w, r = (mean(x^2) + epsilon)^(-1/2), in float32 as in transformers. */
void NAME(rms_norm)(const REAL *x, const REAL *w, double epsilon, REAL *out, float *inverse, long rows, long width,
                    long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const REAL *row = x + i * width;
        REAL *to = out + i * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < width; j++)
            sum += (float)row[j] * (float)row[j];
        float r = 1.0f / sqrtf(sum / (float)width + (float)epsilon);
        inverse[i] = r;
#pragma omp simd
        for (long j = 0; j < width; j++)
            to[j] = (REAL)((float)row[j] * r) * w[j];
    }
}

/* out = x r w with r known, and 0 at dropped places. */
void NAME(normed)(const REAL *x, const REAL *w, const float *inverse, REAL *out, long rows, long width,
                  const long *dropped, long count, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        REAL r = (REAL)inverse[i];
#pragma omp simd
        for (long j = 0; j < width; j++)
            out[i * width + j] = x[i * width + j] * r * w[j];
        NAME(drop)(out, dropped, count, i * width, (i + 1) * width);
    }
}

/* dx += r (dn - n mean(dn n)), dn = dh w, n = x r. */
void NAME(rms_norm_backward)(const REAL *dh, const REAL *x, const float *inverse, const REAL *w, REAL *dx, long rows,
                             long width, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const REAL *d = dh + i * width, *row = x + i * width;
        REAL *to = dx + i * width, r = (REAL)inverse[i], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < width; j++)
            sum += d[j] * w[j] * row[j];
        REAL mean = sum * r * r / (REAL)width;
#pragma omp simd
        for (long j = 0; j < width; j++)
            to[j] += r * (d[j] * w[j] - row[j] * mean);
    }
}

/* dw = sum over rows of dh n; a thread takes whole columns. */
void NAME(rms_norm_weight_gradient)(const REAL *dh, const REAL *x, const float *inverse, REAL *dw, long rows,
                                    long width, long threads)
{
    const long block = 64;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long begin = 0; begin < width; begin += block) {
        long end = begin + block < width ? begin + block : width;
        for (long j = begin; j < end; j++)
            dw[j] = 0;
        for (long i = 0; i < rows; i++) {
            REAL r = (REAL)inverse[i];
#pragma omp simd
            for (long j = begin; j < end; j++)
                dw[j] += dh[i * width + j] * x[i * width + j] * r;
        }
    }
}

/* Heads of a row in place: a' = a c1 - b s1, b' = b c2 + a s2, or by the transpose of that map. */
void NAME(rotate)(REAL *heads, long stride, long count, long size, const REAL *cos, const REAL *sin, long rows,
                  long transposed, long threads)
{
    long half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const REAL *c1 = cos + i * size, *c2 = c1 + half;
        const REAL *sa = sin + i * size + (transposed ? half : 0), *sb = sin + i * size + (transposed ? 0 : half);
        REAL sign = transposed ? 1 : -1;
        for (long h = 0; h < count; h++) {
            REAL *a = heads + i * stride + h * size, *b = a + half;
#pragma omp simd
            for (long j = 0; j < half; j++) {
                REAL former = a[j];
                a[j] = former * c1[j] + sign * (b[j] * sa[j]);
                b[j] = b[j] * c2[j] - sign * (former * sb[j]);
            }
        }
    }
}

/* out = silu(gate) up, and 0 at dropped places; rows of gate and of up stand stride apart. */
void NAME(swiglu)(const REAL *gate, const REAL *up, long stride, REAL *out, long rows, long width,
                  const long *dropped, long count, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const REAL *g = gate + i * stride, *u = up + i * stride;
#pragma omp simd
        for (long j = 0; j < width; j++)
            out[i * width + j] = g[j] / (1 + EXP(-g[j])) * u[j];
        NAME(drop)(out, dropped, count, i * width, (i + 1) * width);
    }
}

/* gate becomes its gradient, dup that of up. */
void NAME(swiglu_backward)(const REAL *da, REAL *gate, const REAL *up, REAL *dup, long count, long threads)
{
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (long i = 0; i < count; i++) {
        REAL g = gate[i], s = 1 / (1 + EXP(-g));
        dup[i] = da[i] * (g * s);
        gate[i] = da[i] * up[i] * (s * (1 + g * (1 - s)));
    }
}
