/* What training computes between its large matrix products, each in one pass over memory. The mathematics and its
   sources stand in the Python modules of models/kernels, which call this where it could be compiled and do the same by
   torch where it could not. Matrices are row-major and contiguous unless a stride is given; nothing is allocated.
   Every row, or column, is computed by one thread in one order, so results do not depend on how many there are. */

#include <math.h>
#include <omp.h>
#include "vectors.h"
#include "dropout.h"

#define REAL float
#define VECTOR float_vector
#define NAME(name) name##_float
#define EXP exp_float
#include "rows.h"
#include "products.h"
#include "attention.h"
#include "large.h"
#undef REAL
#undef VECTOR
#undef NAME
#undef EXP

#define REAL double
#define VECTOR double_vector
#define NAME(name) name##_double
#define EXP exp_double
#include "rows.h"
#include "products.h"
#include "attention.h"
#include "large.h"
