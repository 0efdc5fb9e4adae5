#include "combine.h"

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

constexpr std::int64_t slice_bytes = 192 << 10;
constexpr std::int64_t max_width = 1024;  // columns

// sums[r, j] = sum_i weights[r, i] rows[i, j] for R outs and V vectors of columns
template <typename T, int R, int V>
void weighted_sums(const T* const* rows, std::int64_t m, const double* weights, std::int64_t j,
                   double* const* sums) {
  constexpr int step = lanes<double>;
  Vector<double> acc[R][V] = {};
  for (std::int64_t i = 0; i < m; ++i) {
    Vector<double> x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = load_as_double(rows[i] + j + v * step);
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        acc[r][v] += weights[i * R + r] * x[v];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) {
      store(sums[r] + j + v * step, acc[r][v]);
    }
  }
}

// Over `length` columns in whole vectors of T, two vectors of double each in float32.
template <typename T, int R>
void weighted_sums(const T* const* rows, std::int64_t m, const double* weights, std::int64_t length,
                   double* const* sums) {
  constexpr int step = lanes<double>;
  constexpr int many = R == 1 ? 8 : 2;
  std::int64_t j = 0;
  for (; j + many * step <= length; j += many * step) {
    weighted_sums<T, R, many>(rows, m, weights, j, sums);
  }
  for (; j < length; j += step) {
    weighted_sums<T, R, 1>(rows, m, weights, j, sums);
  }
}

// Weights by groups of outs, [m, R] each, so that a kernel reads them in order.
struct Group {
  std::int64_t first;  // of its outs
  std::int64_t outs;   // R
  std::int64_t m;      // rows up to the last with a weight: triangular weights cost half
  std::vector<double> weights;
};

std::vector<Group> make_groups(const double* weights, std::int64_t p, std::int64_t m) {
  std::vector<Group> groups;
  for (std::int64_t first = 0; first < p; first += tile) {
    Group group{first, std::min<std::int64_t>(tile, p - first), 0, {}};
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t r = first; r < first + group.outs; ++r) {
        group.weights.push_back(weights[r * m + i]);
        group.m = p == 1 || weights[r * m + i] != 0 ? i + 1 : group.m;
      }
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

template <typename T>
void group_sums(const Group& group, const T* const* rows, std::int64_t length, double* const* sums) {
  const double* weights = group.weights.data();
  switch (group.outs) {
    case 1:
      return weighted_sums<T, 1>(rows, group.m, weights, length, sums);
    case 2:
      return weighted_sums<T, 2>(rows, group.m, weights, length, sums);
    case 3:
      return weighted_sums<T, 3>(rows, group.m, weights, length, sums);
    case 4:
      return weighted_sums<T, 4>(rows, group.m, weights, length, sums);
  }
}

// Rounds sums to the outs' type; true if all are finite.
template <typename To>
bool write(const double* sums, std::int64_t length, const Row& out, std::int64_t column) {
  To* to = reinterpret_cast<To*>(out.data) + column * out.stride;
  double infinite = 0;  // NaN once a value is not finite
  for (std::int64_t j = 0; j < length; ++j) {
    narrow(sums[j], to + j * out.stride);
    infinite += static_cast<double>(widen(to[j * out.stride])) * 0;
  }
  return infinite == 0;
}

template <typename T>
class Pass {
 public:
  Pass(const Rows& rows, const std::vector<Group>& groups, const Rows& outs, bool multiply)
      : rows_(rows), outs_(outs), groups_(groups), multiply_(multiply),
        width_(std::clamp<std::int64_t>(
            slice_bytes / std::max<std::int64_t>(rows.m * sizeof(T) + outs.m * sizeof(double), 1) / 64 * 64,
            128, max_width)),
        slice_(rows, width_), out_slice_(outs, width_), sums_(outs.m * width_), sum_rows_(outs.m),
        end_rows_(outs.m) {
    for (std::int64_t r = 0; r < outs.m; ++r) {
      sum_rows_[r] = sums_.data() + r * width_;
    }
  }

  bool run(std::int64_t begin, std::int64_t end, double* cross, double* gram) {
    bool finite = true;
    for_slices(rows_, begin, end, width_,
               [&](const Block& block, std::int64_t column, std::int64_t length) {
                 const Block& out = outs_.blocks[&block - rows_.blocks.data()];
                 finite &= step(block, out, column, length, cross, gram);
               });
    return finite;
  }

 private:
  bool step(const Block& block, const Block& out, std::int64_t column, std::int64_t length,
            double* cross, double* gram) {
    slice_.load(block, column, length);
    for (const Group& group : groups_) {
      double* const* sums = sum_rows_.data() + group.first;
      group_sums(group, slice_.rows(), slice_.whole, sums);
      if (slice_.rest > 0) {
        for (std::int64_t r = 0; r < group.outs; ++r) {
          end_rows_[r] = sums[r] + slice_.whole;
        }
        group_sums(group, slice_.ends(), lanes<T>, end_rows_.data());
      }
    }
    bool finite = true;
    for (std::int64_t r = 0; r < outs_.m; ++r) {
      dispatch(outs_.dtype, [&](auto type) {
        finite &= write<typename decltype(type)::type>(sum_rows_[r], length, out.rows[r], column);
      });
    }
    if (multiply_) {
      out_slice_.load(out, column, length);
      if (cross != nullptr) {
        products(out_slice_, outs_.m, slice_, rows_.m, false, cross);
      }
      if (gram != nullptr) {
        products(out_slice_, outs_.m, out_slice_, outs_.m, true, gram);
      }
    }
    return finite;
  }

  const Rows& rows_;
  const Rows& outs_;
  const std::vector<Group>& groups_;
  bool multiply_;
  std::int64_t width_;
  Slice<T> slice_, out_slice_;
  std::vector<double> sums_;
  std::vector<double*> sum_rows_, end_rows_;
};

}  // namespace

bool combine(const Rows& rows, const double* weights, const Rows& outs, double* cross, double* gram,
             int threads) {
  const std::int64_t m = rows.m, p = outs.m;
  const std::vector<Group> groups = make_groups(weights, p, m);
  threads = threads_for(rows, threads);
  std::vector<double> parts(threads * p * (m + p));
  std::vector<char> finite(threads, 1);
  const bool multiply = cross != nullptr || gram != nullptr;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    std::int64_t begin = share(rows.n, t, threads), end = share(rows.n, t + 1, threads);
    double* part = parts.data() + t * p * (m + p);
    double* cross_part = cross != nullptr ? part : nullptr;
    double* gram_part = gram != nullptr ? part + p * m : nullptr;
    if (rows.dtype == Dtype::float64) {
      finite[t] = Pass<double>(rows, groups, outs, multiply).run(begin, end, cross_part, gram_part);
    } else {
      finite[t] = Pass<float>(rows, groups, outs, multiply).run(begin, end, cross_part, gram_part);
    }
  }
  bool all = true;
  for (int t = 0; t < threads; ++t) {
    all = all && finite[t];
    const double* part = parts.data() + t * p * (m + p);
    for (std::int64_t i = 0; cross != nullptr && i < p * m; ++i) {
      cross[i] = (t == 0 ? 0 : cross[i]) + part[i];
    }
    for (std::int64_t i = 0; gram != nullptr && i < p; ++i) {
      for (std::int64_t j = 0; j <= i; ++j) {
        gram[i * p + j] = (t == 0 ? 0 : gram[i * p + j]) + part[p * m + i * p + j];
        gram[j * p + i] = gram[i * p + j];
      }
    }
  }
  return all;
}

}  // namespace gradsurgery::GRADSURGERY_ISA
