// outs = W J: p weighted sums of m rows, in one pass that can also multiply the outs with the rows
// and with one another.
#pragma once

#include "cpu.h"
#include "rows.h"

namespace gradsurgery {

// `precise` sums in float64; else 32- and 16-bit rows are summed in float32. `weights` is [p, m];
// `cross`, [p, m], and `gram`, [p, p], may be null. Outs may be rows. Returns whether all outs are
// finite.
GRADSURGERY_DECLARE(bool combine(const Rows& rows, const double* weights, const Rows& outs,
                                 double* cross, double* gram, bool precise, int threads))

}  // namespace gradsurgery
