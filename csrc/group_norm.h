// The derivative of group norm's gradient.
#pragma once

#include "cpu.h"

namespace gradsurgery {

// With n = (x - mean) rstd, P z = z - <z> - n <z n>, <.> a group's mean, group norm's gradient is
// dx = rstd P(weight dy), dweight = sum dy n, dbias = sum dy. Of <u, dx> + <p, dweight> + <q,
// dbias>: the derivatives in dy and in x, [N, C, L], and, for each sample, the one in weight, [N,
// C].
struct GroupNormSides {
  Tensor dy, x, u;      // [N, C, L]
  Tensor weight, p, q;  // [C]
  Tensor mean, rstd;    // [N, G], G a divisor of C
  Tensor to_dy, to_x;   // [N, C, L]
  Tensor to_weight;     // [N, C]
};

// All contiguous, float32 or float64.
GRADSURGERY_DECLARE(void group_norm_double_backward(const GroupNormSides& sides, int threads))

}  // namespace gradsurgery
