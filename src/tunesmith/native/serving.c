/* What serving computes on a CPU, in float32. Each file beside this has one part; the Python modules of
   tunesmith.serving call them where they could be compiled and do the same by torch where they could not. */

#include <math.h>
#include <omp.h>
#include <string.h>
#include "quads.h"
#include "panels.h"
#include "product.h"
#include "adapters.h"
#include "next_attention.h"
#include "next_tokens.h"
