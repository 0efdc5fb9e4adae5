#include "project_out.h"

#include <algorithm>
#include <cmath>

#include "combine.h"
#include "gramian.h"
#include "products.h"
#include "weighting.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

class Projection {
 public:
  Projection(const Rows& rows, const Rows& out, const ProjectionLimits& limits, int threads)
      : out_(out),
        limits_(limits),
        threads_(threads),
        m_(rows.m - 1),
        single_(rows.dtype != Dtype::float64),
        rows_(rows),
        gram_(rows.m * rows.m),
        exact_(single_ ? rows.m * rows.m : 0),
        among_(m_ * m_),
        products_(rows.m),
        c_(m_),
        weights_(rows.m),
        norms_(m_) {}

  std::optional<Projected> run() {
    // float64 products cost little where the rows fit in cache
    precise_ = !single_ || rows_.n <= few_columns;
    if (!solve() || too_short()) {
      return std::nullopt;
    }
    if (!precise_ && margin_ <= limits_.safe_margin) {
      precise_ = true;
      if (!solve()) {
        return std::nullopt;
      }
    }
    const double square = square_of(m_);
    double parts = 0;
    for (std::int64_t i = 0; i < m_; ++i) {
      norms_[i] = std::sqrt(square_of(i));
      parts += std::fabs(c_[i]) * norms_[i];
    }
    bool sums = precise_ || parts > limits_.safe_parts * std::sqrt(margin_ * square);
    // a float64 solve is some 1e-15 / margin off
    const bool settled = limits_.promise * margin_ >= 1e-15;
    for (std::int64_t correction = 0;; ++correction) {
      double left = 0;  // |g⊥|²
      if (!subtract(sums, &left)) {
        return std::nullopt;
      }
      if (single_ && !float32_holds(left)) {
        multiply_exactly();
        left = exact_[m_ * (m_ + 1) + m_];
      }
      const double kept = square > 0 ? std::sqrt(left / square) : 0;
      if (!(kept > limits_.rtol)) {
        clear();
        return Projected{rank_, 0, 0};
      }
      const double worst = largest_cosine(left);
      const bool kept_promise = worst <= limits_.promise && (settled || correction > 0);
      if (correction == limits_.refine || kept_promise) {
        return Projected{rank_, kept > 1 ? 1 : kept, worst};
      }
      if (!precise_) {
        precise_ = sums = true;
        if (!multiply()) {
          return std::nullopt;
        }
      }
      if (single_) {  // the solve divides their error by the distance of near duplicates
        multiply_exactly();
      }
      find_coefficients();
    }
  }

 private:
  double square_of(std::int64_t i) const { return gram_[i * (m_ + 1) + i]; }

  // The Gramian; false if a norm is not finite.
  bool multiply() {
    gramian(rows_, gram_.data(), precise_, threads_);
    bool finite = true;
    for (std::int64_t i = 0; i <= m_; ++i) {
      finite = finite && std::isfinite(square_of(i));
    }
    for (std::int64_t i = 0; i < m_; ++i) {
      std::copy_n(gram_.data() + i * (m_ + 1), m_, among_.data() + i * m_);
    }
    return finite;
  }

  void find_coefficients() {
    projection_weights(among_.data(), products_.data(), c_.data(), &rank_, &margin_, 1, m_,
                       limits_.rtol, threads_);
  }

  // The Gramian, the coefficients of g and how near the decisions were.
  bool solve() {
    if (!multiply()) {
      return false;
    }
    std::copy_n(gram_.data() + m_ * (m_ + 1), m_, products_.data());
    find_coefficients();
    double taken = 0;
    for (std::int64_t i = 0; i < m_; ++i) {
      taken += c_[i] * products_[i];
    }
    const double square = square_of(m_), kept = square > 0 ? 1 - taken / square : 0;
    margin_ = kept >= margin_ ? margin_ : kept;
    return true;
  }

  // Whether a row has a square that lost digits, and is not zero itself.
  bool too_short() const {
    for (std::int64_t i = 0; !single_ && i <= m_; ++i) {
      if (square_of(i) < limits_.least) {
        for (const Block& block : rows_.blocks) {
          const double* values = reinterpret_cast<const double*>(block.rows[i].data);
          for (std::int64_t j = 0; j < block.columns; ++j) {
            if (values[j * block.rows[i].stride] != 0) {
              return true;
            }
          }
        }
      }
    }
    return false;
  }

  // out = the last row less the others' parts, which then is the last row; its products with the
  // others and its square. False if a value is not finite.
  bool subtract(bool precise, double* left) {
    for (std::int64_t i = 0; i < m_; ++i) {
      weights_[i] = -c_[i];
    }
    weights_[m_] = 1;
    if (!combine(rows_, weights_.data(), out_, products_.data(), left, precise, threads_)) {
      return false;
    }
    for (std::size_t k = 0; k < rows_.blocks.size(); ++k) {
      rows_.blocks[k].rows[m_] = out_.blocks[k].rows[0];
    }
    return true;
  }

  // Products of the rows with g⊥ in float64.
  void multiply_exactly() {
    gramian(rows_, exact_.data(), true, threads_);
    std::copy_n(exact_.data() + m_ * (m_ + 1), m_, products_.data());
  }

  // Whether products of rows and g⊥ neither under- nor overflow.
  bool float32_holds(double left) const {
    const double low = 1e-34 * static_cast<double>(rows_.n), high = 1e38;
    bool holds = left > low && left < high;
    for (std::int64_t i = 0; i < m_; ++i) {
      const double square = norms_[i] * norms_[i];
      holds = holds && (square == 0 || (square > low && square < high));
    }
    return holds;
  }

  double largest_cosine(double left) const {
    double worst = 0;
    for (std::int64_t i = 0; i < m_; ++i) {
      const double cosine =
          norms_[i] > 0 ? std::fabs(products_[i] / (norms_[i] * std::sqrt(left))) : 0;
      worst = cosine <= worst ? worst : cosine;
    }
    return worst;
  }

  void clear() {
    dispatch(out_.dtype, [&](auto type) {
      using Value = typename decltype(type)::type;
      for (const Block& block : out_.blocks) {
        std::fill_n(reinterpret_cast<Value*>(block.rows[0].data), block.columns, Value{});
      }
    });
  }

  const Rows& out_;
  const ProjectionLimits& limits_;
  const int threads_;
  const std::int64_t m_;                      // rows of J
  const bool single_;                         // rows of 32 or 16 bits
  Rows rows_;                                 // those of J, and g or g⊥
  std::vector<double> gram_, exact_, among_;  // [m + 1, m + 1], [m + 1, m + 1], [m, m]
  std::vector<double> products_, c_, weights_, norms_;
  std::int64_t rank_ = 0;
  double margin_ = 1;  // squared relative distance of the nearest decision
  bool precise_ = true;
};

}  // namespace

std::optional<Projected> project_out(const Rows& rows, const Rows& out,
                                     const ProjectionLimits& limits, int threads) {
  return Projection(rows, out, limits, threads).run();
}

}  // namespace gradsurgery::GRADSURGERY_ISA
