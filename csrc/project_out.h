// g⊥ = g - Jᵀ c, (J Jᵀ) c = J g, in one call: what gradsurgery/ops/project_out.py does step by
// step.
#pragma once

#include <optional>

#include "cpu.h"
#include "rows.h"

namespace gradsurgery {

struct ProjectionLimits {
  double rtol;                     // relative distance to the span below which a vector lies in it
  std::int64_t refine;             // corrections at most
  double promise;                  // cosine with a row at most
  double safe_margin, safe_parts;  // where float32 arithmetic keeps the promise
  double least;                    // squared norms below it have lost digits
};

struct Projected {
  std::int64_t rank;
  double kept;   // |g⊥| / |g|
  double worst;  // largest cosine of g⊥ with a row
};

// `rows` are those of J and, last, g; `out` is g⊥, one row, contiguous. Nothing where a number is
// not finite or a row too short for its square: then `out` has no meaning.
GRADSURGERY_DECLARE(std::optional<Projected> project_out(const Rows& rows, const Rows& out,
                                                         const ProjectionLimits& limits,
                                                         int threads))

}  // namespace gradsurgery
