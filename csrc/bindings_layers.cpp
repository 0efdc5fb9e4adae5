// The operators on a layer's inputs and its outputs' gradients, for Python: tokens and group norm.
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "combine_tokens.h"
#include "cpu.h"
#include "formed_gramian.h"
#include "group_norm.h"
#include "token_gramian.h"
#include "tokens.h"

namespace gradsurgery {

namespace {

void check_tokens(const Tokens& tokens, const char* name, const Tokens& like) {
  for (const Tensor* side : {&tokens.left, &tokens.right}) {
    check(side->ndim == 3 && side->device == Device::cpu && side->dtype == like.left.dtype &&
              side->size(0) == tokens.left.size(0) && side->size(1) == tokens.left.size(1),
          name, " must be two [n, T, .] of one dtype on the CPU, got ", side->shape_text());
  }
  check(tokens.left.dtype == Dtype::float32 || tokens.left.dtype == Dtype::float64, name,
        " must be float32 or float64, not ", gradsurgery::name(tokens.left.dtype));
  check(tokens.left.size(2) == like.left.size(2) && tokens.right.size(2) == like.right.size(2),
        name, " must be as wide as the first tokens, got ", tokens.left.shape_text(), " and ",
        tokens.right.shape_text());
}

void token_gramian_cpu(const Tensor& left, const Tensor& right,
                       const std::optional<Tensor>& other_left,
                       const std::optional<Tensor>& other_right, const Tensor& out, int threads) {
  const Tokens first{left, right};
  check_tokens(first, "left and right", first);
  std::optional<Tokens> second;
  check(other_left.has_value() == other_right.has_value(),
        "other_left and other_right come together");
  if (other_left) {
    second = Tokens{*other_left, *other_right};
    check_tokens(*second, "other_left and other_right", first);
  }
  double* gram = matrix(out, first.blocks(), (second ? *second : first).blocks(), "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(token_gramian)(first, second ? &*second : nullptr, gram, threads);
}

void formed_gramian_cpu(const std::vector<Tensor>& left, const std::vector<Tensor>& right,
                        const std::vector<Tensor>& rows, std::int64_t count,
                        const std::optional<Tensor>& kept, const Tensor& out, int threads) {
  check(!left.empty() && left.size() == right.size() && left.size() == rows.size(),
        "left, right and rows must be as many, one at least");
  Planes planes{{}, count, kept, left[0].size(-1), right[0].size(-1), left[0].dtype};
  for (std::size_t k = 0; k < left.size(); ++k) {
    const Tokens tokens{left[k], right[k]};
    check_tokens(tokens, "left and right", k == 0 ? tokens : planes.parts[0].tokens);
    check(rows[k].ndim == 1 && rows[k].size(0) == tokens.blocks() && rows[k].is_contiguous() &&
              rows[k].device == Device::cpu,
          "rows must be a contiguous [", tokens.blocks(), "] on the CPU, got ",
          rows[k].shape_text());
    planes.parts.push_back({tokens, rows[k].data_as<std::int64_t>()});
    for (std::int64_t i = 0; i < tokens.blocks(); ++i) {
      const std::int64_t row = planes.parts[k].rows[i];
      check(row >= 0 && row < count, "rows must be from 0 to ", count - 1, ", got ", row);
    }
  }
  check(!kept ||
            (kept->ndim == 2 && kept->size(0) == planes.height && kept->size(1) == planes.width &&
             kept->dtype == planes.dtype && kept->device == Device::cpu),
        "kept must be [", planes.height, ", ", planes.width, "] ", name(planes.dtype),
        " on the CPU, got ", kept ? kept->shape_text() : "");
  double* gram = matrix(out, planes.rows(), planes.rows(), "out");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(formed_gramian)(std::move(planes), gram, threads);
}

void combine_tokens_cpu(const Tensor& left, const Tensor& right, const Tensor& weights, double beta,
                        const Tensor& out, int threads) {
  const Tokens tokens{left, right};
  check_tokens(tokens, "left and right", tokens);
  check(weights.ndim == 1 && weights.size(0) == tokens.blocks() && weights.is_contiguous() &&
            weights.device == Device::cpu,
        "weights must be a contiguous [", tokens.blocks(), "] on the CPU, got ",
        weights.shape_text());
  check(out.ndim == 2 && out.size(0) == left.size(2) && out.size(1) == right.size(2) &&
            out.dtype == left.dtype && out.device == Device::cpu &&
            (out.stride(0) == 1 || out.stride(1) == 1),
        "out must be [", left.size(2), ", ", right.size(2), "] ", name(left.dtype),
        " on the CPU with a stride of 1, got ", out.shape_text(), " ", name(out.dtype));
  const double* w = weights.data_as<double>();
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(combine_tokens)(tokens, w, beta, out, threads);
}

void group_norm_double_backward_cpu(const Tensor& dy, const Tensor& x, const Tensor& u,
                                    const Tensor& weight, const Tensor& p, const Tensor& q,
                                    const Tensor& mean, const Tensor& rstd, const Tensor& to_dy,
                                    const Tensor& to_x, const Tensor& to_weight, int threads) {
  check(x.ndim == 3 && x.numel() > 0 && (x.dtype == Dtype::float32 || x.dtype == Dtype::float64),
        "x must be [N, C, L], not empty, float32 or float64, got ", x.shape_text(), " ",
        name(x.dtype));
  const std::int64_t batch = x.size(0), channels = x.size(1);
  check(mean.ndim == 2 && mean.size(0) == batch && mean.size(1) > 0 && channels % mean.size(1) == 0,
        "mean must be [", batch, ", G], G a divisor of ", channels, ", got ", mean.shape_text());
  const auto agrees = [&](const Tensor& tensor, std::int64_t size, const char* what) {
    check(tensor.numel() == size && tensor.is_contiguous() && tensor.device == Device::cpu &&
              tensor.dtype == x.dtype,
          what, " must be ", size, " contiguous values on the CPU, ", name(x.dtype), ", got ",
          tensor.shape_text(), " ", name(tensor.dtype));
  };
  for (const auto& [tensor, what] :
       {std::pair{&x, "x"}, {&dy, "dy"}, {&u, "u"}, {&to_dy, "to_dy"}, {&to_x, "to_x"}}) {
    agrees(*tensor, x.numel(), what);
  }
  for (const auto& [tensor, what] : {std::pair{&weight, "weight"}, {&p, "p"}, {&q, "q"}}) {
    agrees(*tensor, channels, what);
  }
  agrees(mean, mean.numel(), "mean");
  agrees(rstd, mean.numel(), "rstd");
  agrees(to_weight, batch * channels, "to_weight");
  py::gil_scoped_release release;
  GRADSURGERY_SELECT(group_norm_double_backward)
  ({dy, x, u, weight, p, q, mean, rstd, to_dy, to_x, to_weight}, threads);
}

}  // namespace

void bind_layers(py::module_& module) {
  module.def("token_gramian_cpu", &token_gramian_cpu, py::arg("left"), py::arg("right"),
             py::arg("other_left"), py::arg("other_right"), py::arg("out"), py::arg("threads"));
  module.def("formed_gramian_cpu", &formed_gramian_cpu, py::arg("left"), py::arg("right"),
             py::arg("rows"), py::arg("count"), py::arg("kept"), py::arg("out"),
             py::arg("threads"));
  module.def("combine_tokens_cpu", &combine_tokens_cpu, py::arg("left"), py::arg("right"),
             py::arg("weights"), py::arg("beta"), py::arg("out"), py::arg("threads"));
  module.def("group_norm_double_backward_cpu", &group_norm_double_backward_cpu, py::arg("dy"),
             py::arg("x"), py::arg("u"), py::arg("weight"), py::arg("p"), py::arg("q"),
             py::arg("mean"), py::arg("rstd"), py::arg("to_dy"), py::arg("to_x"),
             py::arg("to_weight"), py::arg("threads"));
}

}  // namespace gradsurgery
