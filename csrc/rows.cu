// Rows of tensors as the kernels' tables hold them.
#include "device.cuh"

namespace gradsurgery::cuda {

namespace {

std::int64_t element_size(Dtype dtype) {
  return dispatch(dtype, [](auto type) {
    return static_cast<std::int64_t>(sizeof(typename decltype(type)::type));
  });
}

void check_device(const Tensor& tensor, const char* name) {
  check(tensor.device == gpu, name, " is not on a CUDA device");
}

}  // namespace

DeviceRows make_device_rows(const Sources& sources, const char* name) {
  check(!sources.empty() && !sources[0].empty(), name, " holds no tensor");
  const Tensor& head = sources[0][0];
  const std::size_t count = sources[0].size();
  const int parts = static_cast<int>(sources.size());
  check(sources.size() <= Table::max_spans, name, " has ", sources.size(),
        " sources, a GPU takes at most ", Table::max_spans);
  DeviceRows rows{head.dtype,
                  0,
                  0,
                  1,
                  parts,
                  {},
                  {},
                  head.device_index,
                  static_cast<cudaStream_t>(head.stream)};
  rows.spans.resize(count * parts);
  rows.columns.resize(count);
  const std::int64_t size = element_size(rows.dtype);
  for (int s = 0; s < parts; ++s) {
    check(sources[s].size() == count, name, "[", s, "] has ", sources[s].size(), " tensors, ", name,
          "[0] has ", count);
    for (std::size_t k = 0; k < count; ++k) {
      const Tensor& tensor = sources[s][k];
      check_device(tensor, name);
      check(tensor.device_index == rows.device, name, "[", s, "][", k, "] is on another device");
      check(tensor.dtype == rows.dtype, name, "[", s, "][", k, "] is ",
            gradsurgery::name(tensor.dtype), ", ", name, "[0][0] is ",
            gradsurgery::name(rows.dtype));
      check(tensor.ndim == 2 && tensor.size(0) == sources[s][0].size(0) &&
                (s == 0 || tensor.size(1) == rows.columns[k]),
            name, "[", s, "][", k, "] has shape ", tensor.shape_text(), ", which does not fit");
      rows.columns[k] = tensor.size(1);
      rows.spans[k * parts + s] = {tensor.data_as<char>(), tensor.size(0), tensor.stride(0) * size,
                                   tensor.stride(1) * size, 0};
    }
    rows.m += sources[s][0].size(0);
  }
  for (std::int64_t columns : rows.columns) {
    rows.n += columns;
  }
  return rows;
}

DeviceRows make_device_rows(const Tensor& matrices, const char* name) {
  check_device(matrices, name);
  check(matrices.ndim == 3, name, " must be [b, m, n], got ", matrices.shape_text());
  const std::int64_t size = element_size(matrices.dtype);
  const Span span{matrices.data_as<char>(), matrices.size(1), matrices.stride(1) * size,
                  matrices.stride(2) * size, matrices.stride(0) * size};
  return {matrices.dtype,
          matrices.size(1),
          matrices.size(2),
          matrices.size(0),
          1,
          {span},
          {matrices.size(2)},
          matrices.device_index,
          static_cast<cudaStream_t>(matrices.stream)};
}

DeviceRows join(const DeviceRows& above, const DeviceRows& below) {
  check(above.columns.size() == below.columns.size() && above.dtype == below.dtype &&
            above.device == below.device && above.batch == below.batch,
        "outs must have the tensors, the dtype and the device of sources");
  DeviceRows rows = above;
  rows.m += below.m;
  rows.sources += below.sources;
  check(rows.sources <= Table::max_spans, "sources and outs are ", rows.sources,
        " lists of tensors, a GPU takes at most ", Table::max_spans);
  rows.spans.clear();
  for (std::size_t k = 0; k < rows.columns.size(); ++k) {
    check(above.columns[k] == below.columns[k], "outs[.][", k, "] has ", below.columns[k],
          " columns, sources[.][", k, "] has ", above.columns[k]);
    auto append = [&](const DeviceRows& from) {
      rows.spans.insert(rows.spans.end(), from.spans.begin() + k * from.sources,
                        from.spans.begin() + (k + 1) * from.sources);
    };
    append(above);
    append(below);
  }
  return rows;
}

std::int64_t last_source_rows(const DeviceRows& rows) {
  return rows.columns.empty() ? 0 : rows.spans[rows.sources - 1].rows;
}

DeviceRows without_last_source(const DeviceRows& rows) {
  DeviceRows head = rows;
  head.m -= last_source_rows(rows);
  --head.sources;
  head.spans.clear();
  for (std::size_t k = 0; k < rows.columns.size(); ++k) {
    const auto first = rows.spans.begin() + k * rows.sources;
    head.spans.insert(head.spans.end(), first, first + head.sources);
  }
  return head;
}

void check_result(const Tensor& tensor, Dtype dtype, std::int64_t numel, int device,
                  const char* name) {
  check_device(tensor, name);
  check(tensor.dtype == dtype && tensor.is_contiguous() && tensor.numel() >= numel &&
            tensor.device_index == device,
        name, " must be contiguous ", gradsurgery::name(dtype), " of ", numel,
        " values on the rows' device, got ", tensor.shape_text());
}

}  // namespace gradsurgery::cuda
