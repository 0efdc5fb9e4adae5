#include "group_norm.h"

#include <algorithm>

#include "simd.h"

namespace gradsurgery::GRADSURGERY_ISA {

namespace {

// Values summed in their own dtype before they go into a float64 sum: 32 a lane at most.
constexpr std::int64_t chunk = 32 * vector_bytes / sizeof(double);

template <typename T>
class Sum {
 public:
  template <typename V>
  void add(V value) {
    if constexpr (std::is_same_v<V, T>) {
      single_ += value;
    } else {
      lanes_ += value;
    }
  }

  void flush() {
    total_ += static_cast<double>(sum<T>(lanes_)) + static_cast<double>(single_);
    lanes_ = Vector<T>{};
    single_ = 0;
  }

  double total() const { return total_; }

 private:
  Vector<T> lanes_{};
  T single_ = 0;
  double total_ = 0;
};

// function(i) of whole vectors, then of single values
template <typename T, typename Function>
inline void each(std::int64_t begin, std::int64_t end, Function&& function) {
  std::int64_t i = begin;
  for (; i + lanes<T> <= end; i += lanes<T>) {
    function.template operator()<Vector<T>>(i);
  }
  for (; i < end; ++i) {
    function.template operator()<T>(i);
  }
}

template <typename T>
class DoubleBackward {
 public:
  explicit DoubleBackward(const GroupNormSides& sides)
      : dy_(read(sides.dy)),
        x_(read(sides.x)),
        u_(read(sides.u)),
        weight_(read(sides.weight)),
        p_(read(sides.p)),
        q_(read(sides.q)),
        mean_(read(sides.mean)),
        rstd_(read(sides.rstd)),
        to_dy_(sides.to_dy.data_as<T>()),
        to_x_(sides.to_x.data_as<T>()),
        to_weight_(sides.to_weight.data_as<T>()),
        channels_(sides.x.size(1)),
        inner_(sides.x.size(2)),
        per_group_(channels_ / sides.mean.size(1)),
        groups_(sides.mean.numel()) {}

  std::int64_t groups() const { return groups_; }

  void run(std::int64_t group) const {
    const T mean = mean_[group], rstd = rstd_[group];
    const double r = static_cast<double>(rstd);
    const double count = static_cast<double>(per_group_ * inner_);
    // sums over the group; of dy each channel's by weight and by p
    double u = 0, un = 0, weighted = 0, weighted_n = 0, pulled = 0, pulled_n = 0;
    channels(group, [&](std::int64_t c, std::int64_t at) {
      const T *const dys = dy_ + at, *const xs = x_ + at, *const us = u_ + at;
      Sum<T> of_u, of_un, of_dy, of_dyn;
      for (std::int64_t i = 0; i < inner_; i += chunk) {
        each<T>(i, std::min(i + chunk, inner_), [&]<typename V>(std::int64_t k) {
          const V n = (load_vector<V>(xs + k) - mean) * rstd;
          const V one = load_vector<V>(us + k), other = load_vector<V>(dys + k);
          of_u.add(one);
          of_un.add(V(one * n));
          of_dy.add(other);
          of_dyn.add(V(other * n));
        });
        for (Sum<T>* sum : {&of_u, &of_un, &of_dy, &of_dyn}) {
          sum->flush();
        }
      }
      u += of_u.total();
      un += of_un.total();
      weighted += weight_[c] * of_dy.total();
      weighted_n += weight_[c] * of_dyn.total();
      pulled += p_[c] * of_dy.total();
      pulled_n += p_[c] * of_dyn.total();
    });
    const double along = un / count, across = weighted_n / count;

    double touched = 0;  // sum of weight dy rstd P u
    const T u_mean = static_cast<T>(u / count), u_along = static_cast<T>(along);
    channels(group, [&](std::int64_t c, std::int64_t at) {
      const T *const dys = dy_ + at, *const xs = x_ + at, *const us = u_ + at;
      T* const out = to_dy_ + at;
      const T w = weight_[c], p = p_[c], q = q_[c];
      Sum<T> product;
      for (std::int64_t i = 0; i < inner_; i += chunk) {
        each<T>(i, std::min(i + chunk, inner_), [&]<typename V>(std::int64_t k) {
          const V n = (load_vector<V>(xs + k) - mean) * rstd;
          const V kept = (load_vector<V>(us + k) - u_mean - n * u_along) * rstd;
          product.add(V(load_vector<V>(dys + k) * kept));
          store(out + k, V(kept * w + n * p + q));
        });
        product.flush();
      }
      to_weight_[at / inner_] = static_cast<T>(product.total());
      touched += w * product.total();
    });

    // rstd P z, z = (p - rstd along weight) dy - rstd across u, and what goes through rstd
    const double z_mean = (pulled - r * along * weighted - r * across * u) / count;
    const double z_along = (pulled_n - r * along * weighted_n - r * across * un) / count;
    const T by_u = static_cast<T>(-r * r * across), constant = static_cast<T>(-r * z_mean);
    const T by_n = static_cast<T>(-r * (z_along + touched / count));
    channels(group, [&](std::int64_t c, std::int64_t at) {
      const T *const dys = dy_ + at, *const xs = x_ + at, *const us = u_ + at;
      T* const out = to_x_ + at;
      const T by_dy = static_cast<T>(r * (p_[c] - r * along * weight_[c]));
      each<T>(0, inner_, [&]<typename V>(std::int64_t k) {
        const V n = (load_vector<V>(xs + k) - mean) * rstd;
        store(out + k, V(load_vector<V>(dys + k) * by_dy + load_vector<V>(us + k) * by_u +
                         n * by_n + constant));
      });
    });
  }

 private:
  static const T* read(const Tensor& tensor) { return tensor.data_as<T>(); }

  // function(channel, where its values begin) for each of a group's channels
  template <typename Function>
  void channels(std::int64_t group, Function&& function) const {
    const std::int64_t first = group * per_group_;
    for (std::int64_t k = first; k < first + per_group_; ++k) {
      function(k % channels_, k * inner_);
    }
  }

  const T *dy_, *x_, *u_, *weight_, *p_, *q_, *mean_, *rstd_;
  T *to_dy_, *to_x_, *to_weight_;
  std::int64_t channels_, inner_, per_group_, groups_;
};

template <typename T>
void run(const GroupNormSides& sides, int threads) {
  const DoubleBackward<T> task(sides);
  // a second thread pays for its start from some ten microseconds on
  threads =
      static_cast<int>(std::clamp<std::int64_t>(sides.x.numel() >> 15, 1, std::max(threads, 1)));
  const std::int64_t groups = task.groups();
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t group = 0; group < groups; ++group) {
    task.run(group);
  }
}

}  // namespace

void group_norm_double_backward(const GroupNormSides& sides, int threads) {
  if (sides.x.dtype == Dtype::float64) {
    run<double>(sides, threads);
  } else {
    run<float>(sides, threads);
  }
}

}  // namespace gradsurgery::GRADSURGERY_ISA
