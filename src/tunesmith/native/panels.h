/* A weight W (columns, width) of serving, laid out once, in the fewest bits that give the same numbers.

   It lies in panels of 16 columns, the last filled up with zeros: of each step along the width 16 numbers, so that a
   product reads strictly forward. Numbers have 32 bits, or fewer where W allows it, which is looked at number by number:

   16: the upper halves of the numbers, whose lower ones are zeros: those of a bfloat16 checkpoint;
   8, 4: code times step plus offset, with a step and an offset for each column and 32 of its numbers in turn: those of
       a checkpoint once quantised so (Q8_0 and Q4_1 of llama.cpp's ggml). A step has 11 bits as theirs have, so that
       code times step is exact, and no processor rounds the whole otherwise than another.

   Where 16 numbers would stand, words have the codes of 32 / bits steps for each column, the first in the lowest bits. */

#define PANEL 16
#define BLOCK 32 /* numbers of a column with one step and offset; fewer bits need a width of whole blocks */

/* A vector, how many make a panel's columns, and how many rows of a product have sums in registers, beside weights and a
   number. */
#if defined(__AVX512F__)
#define BYTES 64
#define MOST_ROWS 28
#define EACH_ROWS(DO) \
    DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11) DO(12) DO(13) DO(14) DO(15) DO(16) DO(17) \
    DO(18) DO(19) DO(20) DO(21) DO(22) DO(23) DO(24) DO(25) DO(26) DO(27) DO(28)
#else
#if defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#if defined(__AVX__) || defined(__aarch64__)
#define MOST_ROWS 6
#define EACH_ROWS(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6)
#else
#define MOST_ROWS 3
#define EACH_ROWS(DO) DO(1) DO(2) DO(3)
#endif
#endif
#define VECTORS (PANEL * 4 / BYTES)

typedef float lanes __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef unsigned words __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef int signed_words __attribute__((vector_size(BYTES), aligned(4), may_alias));

/* Bytes of a panel. */
static inline long panel_bytes(long width, long bits)
{
    return PANEL * (width * bits / 8 + (bits < 16 ? width / BLOCK * 8 : 0));
}

/* The numbers of the lowest codes. */
static inline __attribute__((always_inline)) lanes numbers_of(words codes, lanes step, lanes offset, const int bits)
{
    if (bits == 16)
        return (lanes)(codes << 16);
    return __builtin_convertvector((signed_words)(codes & ((1u << (bits % 32)) - 1)), lanes) * step + offset;
}

/* A number with the 11 bits of one of two bytes, rounded to even. */
static inline float short_number(float x)
{
    unsigned n;
    memcpy(&n, &x, sizeof n);
    n = (n + 0xfff + (n >> 13 & 1)) & ~0x1fffu;
    memcpy(&x, &n, sizeof x);
    return x;
}

/* Codes of BLOCK numbers of a column; whether these give the numbers again. */
static int codes_of(const float *w, long bits, unsigned *codes, float *step, float *offset)
{
    int fits = 1;
    if (bits == 16) {
        unsigned lost = 0;
#pragma omp simd reduction(| : lost)
        for (long k = 0; k < BLOCK; k++) {
            unsigned n;
            memcpy(&n, w + k, sizeof n);
            codes[k] = n >> 16;
            lost |= n & 0xffff;
        }
        return !lost;
    }
    float low = w[0], high = w[0];
#pragma omp simd reduction(min : low) reduction(max : high)
    for (long k = 0; k < BLOCK; k++) {
        low = w[k] < low ? w[k] : low;
        high = w[k] > high ? w[k] : high;
    }
    if (bits == 8) { /* around zero */
        *step = short_number((high > -low ? high : -low) / 127);
        *offset = -128 * *step;
    } else {
        *step = short_number((high - low) / 15);
        *offset = low;
    }
    float each = *step, first = *offset, inverse = each > 0 ? 1 / each : 0, most = bits == 8 ? 255 : 15;
#pragma omp simd reduction(& : fits)
    for (long k = 0; k < BLOCK; k++) {
        float code = (w[k] - first) * inverse + 0.5f;
        code = code > 0 ? code : 0; /* and where it is no number */
        int whole = (int)(code < most ? code : most);
        codes[k] = (unsigned)whole;
        fits &= (float)whole * each + first == w[k];
    }
    return fits;
}

/* Whether W's numbers are those of so many bits; all threads stop at the first that is not. */
void panels_fit_float(const float *w, long ldw, long bits, long columns, long width, long *fits, long threads)
{
    long is_right = 1;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(& : is_right)
    for (long c = 0; c < columns; c++)
        for (long k = 0; is_right && k < width; k += BLOCK) {
            unsigned codes[BLOCK];
            float step, offset;
            is_right = codes_of(w + c * ldw + k, bits, codes, &step, &offset);
        }
    *fits = is_right;
}

/* Some columns as a panel of fewer bits, zeros where none is. */
static void pack_panel(const float *w, long ldw, long bits, long columns, long width, char *panel)
{
    long each = 32 / bits;
    for (long k = 0; k < width; k += BLOCK) {
        float *steps = (float *)panel;
        unsigned *to = (unsigned *)(steps + (bits < 16 ? 2 * PANEL : 0));
        for (long c = 0; c < PANEL; c++) {
            unsigned codes[BLOCK] = {0};
            float step = 0, offset = 0;
            if (c < columns)
                codes_of(w + c * ldw + k, bits, codes, &step, &offset);
            if (bits < 16)
                steps[c] = step, steps[PANEL + c] = offset;
            for (long n = 0; n < BLOCK / each; n++) {
                unsigned word = 0;
                for (long j = 0; j < each; j++)
                    word |= codes[n * each + j] << (bits * j);
                to[n * PANEL + c] = word;
            }
        }
        panel = (char *)(to + BLOCK / each * PANEL);
    }
}

/* The numbers of a panel of fewer bits, (width, PANEL). bits is a constant where this is inlined. */
static inline __attribute__((always_inline)) void unpack_bits(const char *panel, long width, float *to, const int bits)
{
    for (long k = 0; k < width; k += BLOCK) {
        lanes step[VECTORS] = {{0}}, offset[VECTORS] = {{0}};
        for (long v = 0; bits < 16 && v < VECTORS; v++)
            step[v] = ((const lanes *)panel)[v], offset[v] = ((const lanes *)panel)[VECTORS + v];
        panel += bits < 16 ? 8 * PANEL : 0;
        for (long n = 0; n < BLOCK * bits / 32; n++, panel += 4 * PANEL, to += 32 / bits * PANEL)
            for (long v = 0; v < VECTORS; v++) {
                words codes = ((const words *)panel)[v];
                for (long j = 0; j < 32 / bits; j++, codes >>= bits)
                    ((lanes *)(to + j * PANEL))[v] = numbers_of(codes, step[v], offset[v], bits);
            }
    }
}

static void unpack_panel(const char *panel, long bits, long width, float *to)
{
    switch (bits) {
    case 32:
        memcpy(to, panel, (size_t)panel_bytes(width, bits));
        break;
    case 16:
        unpack_bits(panel, width, to, 16);
        break;
    case 8:
        unpack_bits(panel, width, to, 8);
        break;
    default:
        unpack_bits(panel, width, to, 4);
    }
}

/* W laid out in so many bits, which ``panels_fit`` it. */
void lay_out_panels_float(const float *w, long ldw, long bits, char *panels, long columns, long width, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < (columns + PANEL - 1) / PANEL; p++) {
        const float *from = w + p * PANEL * ldw;
        char *panel = panels + p * panel_bytes(width, bits);
        long wanted = columns - p * PANEL < PANEL ? columns - p * PANEL : PANEL;
        if (bits < 32) {
            pack_panel(from, ldw, bits, wanted, width, panel);
            continue;
        }
        memset(panel, 0, (size_t)(wanted < PANEL ? panel_bytes(width, bits) : 0));
        for (long k = 0; k < width; k++)
            for (long c = 0; c < wanted; c++)
                ((float *)panel)[k * PANEL + c] = from[c * ldw + k];
    }
}

/* The numbers of panels, (panels, width, PANEL). */
void read_panels_float(const char *panels, long bits, long count, long width, float *to, long threads)
{
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < count; p++)
        unpack_panel(panels + p * panel_bytes(width, bits), bits, width, to + p * width * PANEL);
}
