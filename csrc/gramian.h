// G = J Jᵀ, [m, m] float64.
#pragma once

#include "cpu.h"
#include "rows.h"

namespace gradsurgery {

// `precise` multiplies in float64; else 32- and 16-bit rows are multiplied in float32 within a
// slice and summed in float64 across slices, unless that overflows or underflows.
GRADSURGERY_DECLARE(void gramian(const Rows& rows, double* out, bool precise, int threads))

}  // namespace gradsurgery
