/* Vectors of four numbers, which every processor can rearrange: sums of longer ones, and squares turned over. */
#include "vectors.h"

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int quad_places __attribute__((vector_size(16)));
#if defined(__clang__)
#define PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define PICK(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_places){i, j, k, l})
#endif

/* The sums of four vectors' numbers. */
static inline quad sums_of(const float_vector *v)
{
    quad s[4];
    for (int i = 0; i < 4; i++) {
        union { float_vector whole; quad parts[4]; } u = {v[i]};
        s[i] = (u.parts[0] + u.parts[1]) + (u.parts[2] + u.parts[3]);
    }
    quad left = PICK(s[0], s[1], 0, 4, 1, 5) + PICK(s[0], s[1], 2, 6, 3, 7);
    quad right = PICK(s[2], s[3], 0, 4, 1, 5) + PICK(s[2], s[3], 2, 6, 3, 7);
    return PICK(left, right, 0, 1, 4, 5) + PICK(left, right, 2, 3, 6, 7);
}
