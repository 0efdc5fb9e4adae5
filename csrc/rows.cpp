#include "rows.h"

namespace gradsurgery {

namespace {

std::int64_t element_size(Dtype dtype) {
  return dispatch(dtype, [](auto type) {
    return static_cast<std::int64_t>(sizeof(typename decltype(type)::type));
  });
}

std::int64_t count_of(const Tensor& tensor) { return tensor.ndim == 2 ? tensor.size(0) : 1; }

}  // namespace

Rows make_rows(const std::vector<std::vector<Tensor>>& sources, const char* name) {
  check(!sources.empty() && !sources[0].empty(), name, " holds no tensor");
  const std::size_t count = sources[0].size();
  Rows rows{sources[0][0].dtype, 0, 0, std::vector<Block>(count)};
  const std::int64_t size = element_size(rows.dtype);
  for (std::size_t s = 0; s < sources.size(); ++s) {
    check(sources[s].size() == count, name, "[", s, "] has ", sources[s].size(), " tensors, ", name,
          "[0] has ", count);
    for (std::size_t k = 0; k < count; ++k) {
      const Tensor& tensor = sources[s][k];
      Block& block = rows.blocks[k];
      check(tensor.device == Device::cpu, name, "[", s, "][", k, "] is not on the CPU");
      check(tensor.dtype == rows.dtype, name, "[", s, "][", k, "] is ",
            gradsurgery::name(tensor.dtype), ", ", name, "[0][0] is ",
            gradsurgery::name(rows.dtype));
      const bool fits = tensor.ndim == 1 || tensor.ndim == 2;
      check(fits && count_of(tensor) == count_of(sources[s][0]) &&
                (s == 0 || tensor.size(-1) == block.columns),
            name, "[", s, "][", k, "] has shape ", tensor.shape_text(), ", which does not fit");
      block.columns = tensor.size(-1);
      for (std::int64_t i = 0; i < count_of(tensor); ++i) {
        char* data = tensor.data_as<char>() + (tensor.ndim == 2 ? i * tensor.stride(0) * size : 0);
        block.rows.push_back({data, tensor.stride(-1)});
      }
    }
    rows.m += count_of(sources[s][0]);
  }
  for (const Block& block : rows.blocks) {
    rows.n += block.columns;
  }
  return rows;
}

}  // namespace gradsurgery
