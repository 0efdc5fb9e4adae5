#include "combine.h"

#include <optional>

#include "products.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// What a kernel reads and writes: for R outs, out[r, j] = sum_i weights[i, r] rows[i, j].
template <typename Sum, typename T, typename To>
struct Sums {
  const T* const* rows;
  std::int64_t m;
  const Sum* weights;       // [m, R]
  const char* const* next;  // rows of the next slice, to prefetch, as they are stored
  std::int64_t next_bytes;  // a value's
  To* const* outs;
  decltype(store_rounded(static_cast<To*>(nullptr), Vector<Sum>{})) finite = {};  // else NaN
};

template <typename Sum, typename T, typename To, int R, int V>
void weighted_sums(Sums<Sum, T, To>& s, std::int64_t j) {
  constexpr int step = lanes<Sum>;
  constexpr int value_bytes = R > 1 ? 4 : sizeof(T);  // several outs read mostly float32 as float64
  const std::int64_t ahead = j * s.next_bytes;
  Vector<Sum> acc[R * V] = {}, total[R * V] = {};
  for (std::int64_t i = 0; i < s.m; ++i) {
    // sums of sums round less than one long sum; rows of other types are rounded more than that
    if (std::is_same_v<T, double> && i > 0 && i % 8 == 0) {
#pragma GCC unroll 64
      for (int k = 0; k < R * V; ++k) {
        total[k] += acc[k];
        acc[k] = Vector<Sum>{};
      }
    }
    const T* row = s.rows[i] + j;
    Vector<Sum> x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      x[v] = load_as<Sum>(row + v * step);
    }
    const char* next = s.next[i] + ahead;
#pragma GCC unroll 16
    for (int bytes = 0; bytes < V * step * value_bytes; bytes += 64) {
      __builtin_prefetch(next + bytes, 0, 3);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        acc[r * V + v] += s.weights[i * R + r] * x[v];
      }
    }
  }
  auto finite = s.finite;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      finite += store_rounded(s.outs[r] + j + v * step, total[r * V + v] + acc[r * V + v]) * 0;
    }
  }
  s.finite = finite;
}

// The same over `length` columns, in whole vectors of Sum.
template <typename Sum, typename T, typename To, int R>
void weighted_sums(Sums<Sum, T, To>& s, std::int64_t length) {
  constexpr int step = lanes<Sum>;
  constexpr int many = R == 1 ? 8 : tile;
  std::int64_t j = 0;
  for (; j + many * step <= length; j += many * step) {
    weighted_sums<Sum, T, To, R, many>(s, j);
  }
  for (; j < length; j += step) {
    weighted_sums<Sum, T, To, R, 1>(s, j);
  }
}

template <typename Sum, typename T, typename To>
void weighted_sums(Sums<Sum, T, To>& s, std::int64_t outs, std::int64_t length) {
  switch (outs) {
    case 1:
      return weighted_sums<Sum, T, To, 1>(s, length);
    case 2:
      return weighted_sums<Sum, T, To, 2>(s, length);
#if defined(__AVX512F__)
    case 3:
      return weighted_sums<Sum, T, To, 3>(s, length);
#endif
    case tile:
      return weighted_sums<Sum, T, To, tile>(s, length);
  }
}

// Some outs and their weights, [m, outs], in the order that a kernel reads them.
template <typename Sum>
struct Group {
  std::int64_t first, outs;
  std::int64_t m;  // rows up to the last with a weight: triangular weights cost half
  std::vector<Sum> weights;
};

template <typename Sum>
std::vector<Group<Sum>> make_groups(const double* weights, std::int64_t p, std::int64_t m) {
  std::vector<Group<Sum>> groups;
  for (std::int64_t first = 0; first < p; first += tile) {
    Group<Sum> group{first, std::min<std::int64_t>(tile, p - first), 0, {}};
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t r = first; r < first + group.outs; ++r) {
        group.weights.push_back(static_cast<Sum>(weights[r * m + i]));
        // of a single out every row counts: its NaN must show
        group.m = p == 1 || weights[r * m + i] != 0 ? i + 1 : group.m;
      }
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

// Rounds sums to the outs' type; true if all are finite.
template <typename To, typename Sum>
bool write(const Sum* sums, std::int64_t length, const Row& out, std::int64_t column) {
  To* to = reinterpret_cast<To*>(out.data) + column * out.stride;
  Sum finite = 0;  // NaN once a value is not finite
  for (std::int64_t j = 0; j < length; ++j) {
    narrow(sums[j], to + j * out.stride);
    finite += static_cast<Sum>(widen(to[j * out.stride])) * 0;
  }
  return finite == 0;
}

// T is what rows are read as, Sum what they are summed in.
template <typename T, typename Sum>
class Pass {
 public:
  Pass(const Rows& rows, const std::vector<Group<Sum>>& groups, const Rows& outs, double* cross,
       double* gram)
      : rows_(rows),
        outs_(outs),
        groups_(groups),
        // several outs may be the rows: all are read before one is written
        slice_(rows, slice_width, outs.m > 1),
        out_slice_(outs, slice_width, false),
        sums_(tile * slice_width) {
    if (cross != nullptr) {
      cross_.emplace(outs.m, rows.m, false, cross);
    }
    if (gram != nullptr) {
      gram_.emplace(outs.m, outs.m, true, gram);
    }
  }

  bool run(std::int64_t begin, std::int64_t end) {
    bool finite = true;
    for_slices(rows_, begin, end, slice_width,
               [&](const Block& block, std::int64_t column, std::int64_t length) {
                 const Block& out = outs_.blocks[&block - rows_.blocks.data()];
                 finite &= step(block, out, column, length);
               });
    return finite;
  }

 private:
  bool step(const Block& block, const Block& out, std::int64_t column, std::int64_t length) {
    slice_.load(block, column, length);
    bool finite = true;
    for (const Group<Sum>& group : groups_) {
      const Row* to = out.rows.data() + group.first;
      bool contiguous = true;
      for (std::int64_t r = 0; r < group.outs; ++r) {
        contiguous = contiguous && to[r].stride == 1;
      }
      // straight to the outs where their type has vectors, by a buffer elsewhere and at the end
      std::int64_t done = 0;
      if (contiguous && outs_.dtype == Dtype::float32) {
        finite &= sum_whole<float>(group, to, column);
        done = slice_.whole;
      } else if (contiguous && std::is_same_v<Sum, double> && outs_.dtype == Dtype::float64) {
        finite &= sum_whole<Sum>(group, to, column);
        done = slice_.whole;
      }
      finite &= sum_rest(group, to, column, done);
    }
    if (cross_ || gram_) {
      out_slice_.load(out, column, length);
    }
    if (cross_) {
      cross_->add(out_slice_, slice_, false);
    }
    if (gram_) {
      gram_->add(out_slice_, out_slice_, false);
    }
    return finite;
  }

  // to prefetch what is there already, that is nothing
  static const char* const* own(const T* const* rows) {
    return reinterpret_cast<const char* const*>(rows);
  }

  template <typename To>
  bool sum_whole(const Group<Sum>& group, const Row* to, std::int64_t column) {
    To* outs[tile];
    for (std::int64_t r = 0; r < group.outs; ++r) {
      outs[r] = reinterpret_cast<To*>(to[r].data) + column;
    }
    // the group with all rows prefetches
    const bool prefetch = slice_.next() != nullptr && group.first + group.outs == outs_.m;
    Sums<Sum, T, To> sums{slice_.rows(),
                          group.m,
                          group.weights.data(),
                          prefetch ? slice_.next() : own(slice_.rows()),
                          prefetch ? slice_.next_bytes() : 0,
                          outs};
    weighted_sums(sums, group.outs, slice_.whole);
    return sum_halves<decltype(sums.finite), To>(sums.finite) == 0;
  }

  bool sum_rest(const Group<Sum>& group, const Row* to, std::int64_t column, std::int64_t done) {
    Sum* buffers[tile];
    Sum* ends[tile];
    for (std::int64_t r = 0; r < group.outs; ++r) {
      buffers[r] = sums_.data() + r * slice_width;
      ends[r] = buffers[r] + slice_.whole;
    }
    const Sum* weights = group.weights.data();
    if (done == 0) {
      Sums<Sum, T, Sum> sums{slice_.rows(), group.m, weights, own(slice_.rows()), 0, buffers};
      weighted_sums(sums, group.outs, slice_.whole);
    }
    if (slice_.rest > 0) {
      Sums<Sum, T, Sum> sums{slice_.ends(), group.m, weights, own(slice_.ends()), 0, ends};
      weighted_sums(sums, group.outs, lanes<T>);
    }
    bool finite = true;
    for (std::int64_t r = 0; r < group.outs; ++r) {
      dispatch(outs_.dtype, [&](auto type) {
        finite &= write<typename decltype(type)::type>(
            buffers[r] + done, slice_.whole + slice_.rest - done, to[r], column + done);
      });
    }
    return finite;
  }

  const Rows& rows_;
  const Rows& outs_;
  const std::vector<Group<Sum>>& groups_;
  Slice<T> slice_, out_slice_;
  std::optional<Products<T>> cross_, gram_;
  std::vector<Sum> sums_;  // [tile, width]
};

template <typename T, typename Sum>
bool combine_in(const Rows& rows, const double* weights, const Rows& outs, double* cross,
                double* gram, int threads) {
  const std::int64_t m = rows.m, p = outs.m;
  const std::vector<Group<Sum>> groups = make_groups<Sum>(weights, p, m);
  // a part for every thread, added in their order: the same sum each time
  std::vector<double> parts(threads * p * (m + p));
  std::vector<char> finite(threads, 1);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    double* part = parts.data() + t * p * (m + p);
    Pass<T, Sum> pass(rows, groups, outs, cross != nullptr ? part : nullptr,
                      gram != nullptr ? part + p * m : nullptr);
    finite[t] = pass.run(share(rows.n, t, threads), share(rows.n, t + 1, threads));
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

}  // namespace

bool combine(const Rows& rows, const double* weights, const Rows& outs, double* cross, double* gram,
             bool precise, int threads) {
  threads = threads_for(rows, threads);
  // several outs convert their rows to float64 once, one out while it reads them
  if (rows.dtype == Dtype::float64 || (precise && outs.m > 1)) {
    return combine_in<double, double>(rows, weights, outs, cross, gram, threads);
  }
  if (precise) {
    return combine_in<float, double>(rows, weights, outs, cross, gram, threads);
  }
  return combine_in<float, float>(rows, weights, outs, cross, gram, threads);
}

}  // namespace gradsurgery::GRADSURGERY_ISA
