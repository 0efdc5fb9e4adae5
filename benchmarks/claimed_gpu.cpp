// A GPU that is not there: tensors on "cuda" whose storage is the CPU's memory.
//
// Every operation on them is noted and then computed by the CPU, so what a step asks of a GPU can
// be counted where none is, and what its branches for a GPU compute can be compared. In a hollow
// run large operations are not computed at all, and what they return is zero: models of any size
// go.

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <malloc.h>
#include <torch/library.h>

#include <atomic>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device here(CUDA, 0);
const c10::Stream stream(c10::Stream::DEFAULT, here);

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return here; }
  c10::Device exchangeDevice(c10::Device) const override { return here; }
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}

namespace {

std::mutex lock;  // a backward pass runs in a thread of its own
std::vector<std::string> noted;
bool noting = false;
std::int64_t largest = -1;  // operations on more values are hollow; -1: none is

void note(std::string what) {
  const std::lock_guard<std::mutex> held(lock);
  if (noting) {
    noted.push_back(std::move(what));
  }
}

std::atomic<std::int64_t> taken = 0, most_taken = 0;  // bytes

void take(std::int64_t size) {
  const std::int64_t now = taken += size;
  std::int64_t most = most_taken;
  while (now > most && !most_taken.compare_exchange_weak(most, now)) {
  }
}

// Bytes taken now, and the most since the last call; of what is hollow, and what was made there.
std::vector<std::int64_t> memory() {
  const std::int64_t now = taken;
  return {now, most_taken.exchange(now)};
}

bool on_gpu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == CUDA; }

at::Tensor view_of(c10::Storage storage, const at::Tensor& like, c10::DispatchKey device) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                       c10::DispatchKeySet(device), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                    like.storage_offset());
  return made;
}

// The same memory on another device.
at::Tensor moved(const at::Tensor& tensor, c10::Device to) {
  const c10::Storage& memory = tensor.storage();
  c10::DataPtr data(
      const_cast<void*>(memory.data()), new c10::Storage(memory),
      [](void* owner) { delete static_cast<c10::Storage*>(owner); }, to);
  c10::Storage storage(c10::Storage::use_byte_size_t(), memory.nbytes(), std::move(data), nullptr,
                       /*resizable=*/false);
  const bool cpu = to.type() == c10::DeviceType::CPU;
  return view_of(std::move(storage), tensor, cpu ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA);
}

at::Tensor claimed(const at::Tensor& cpu) { return moved(cpu, here); }

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  const auto kind = dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  std::size_t last = c10::multiply_integers(sizes) > 0 ? 1 : 0;
  for (std::size_t i = 0; last > 0 && i < sizes.size(); ++i) {
    last += (sizes[i] - 1) * strides[i];
  }
  // zeros: of large ones no page is touched
  void* memory = last > 0 ? std::calloc(last, c10::elementSize(kind)) : nullptr;
  TORCH_CHECK(memory != nullptr || last == 0, "claimed GPU: out of memory");
  const auto size = static_cast<std::int64_t>(last * c10::elementSize(kind));
  take(size);
  return claimed(at::from_blob(
      memory, sizes, strides,
      [size](void* held) {
        std::free(held);
        take(-size);
      },
      at::TensorOptions().dtype(kind)));
}

at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const auto like = at::empty(sizes, at::TensorOptions().device(at::kMeta), format);
  return empty_strided(sizes, like.strides(), dtype, {}, {}, {});
}

// The tensors of one call, and what stands for them while it is computed.
class Call {
 public:
  explicit Call(bool computed) : computed_(computed) {}

  at::Tensor stand_in(const at::Tensor& tensor) {
    const bool number = tensor.defined() && tensor.unsafeGetTensorImpl()->is_wrapped_number();
    if (!tensor.defined() || (!on_gpu(tensor) && (computed_ || number))) {
      return tensor;
    }
    const auto options = tensor.options().device(computed_ ? at::kCPU : at::kMeta);
    at::Tensor made;
    if (computed_ && tensor.numel() > 0) {
      made = moved(tensor, at::kCPU);
    } else {  // an empty one may be given a size
      made = at::empty_strided(tensor.sizes(), tensor.strides(), options);
    }
    if (number && computed_) {
      made.unsafeGetTensorImpl()->set_wrapped_number(true);
    }
    pairs_.emplace_back(made, tensor);
    return made;
  }

  at::Tensor result(const at::Tensor& found, bool is_view) {
    if (!found.defined()) {
      return found;
    }
    for (const auto& [made, tensor] : pairs_) {
      if (made.is_same(found)) {
        if (made.numel() != tensor.numel()) {
          const at::Tensor grown = fresh(made);
          tensor.unsafeGetTensorImpl()->set_storage_keep_dtype(grown.storage());
          tensor.unsafeGetTensorImpl()->set_sizes_and_strides(grown.sizes(), grown.strides());
        }
        return tensor;
      }
      if (is_view && made.storage().is_alias_of(found.storage())) {
        return view_of(tensor.storage(), found, c10::DispatchKey::CUDA);
      }
    }
    return fresh(found);
  }

 private:
  at::Tensor fresh(const at::Tensor& found) const {
    return computed_
               ? claimed(found)
               : empty_strided(found.sizes(), found.strides(), found.scalar_type(), {}, {}, {});
  }

  bool computed_;
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;
};

template <typename Each>
c10::IValue mapped(const c10::IValue& value, Each each) {
  if (value.isTensor()) {
    return each(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& tensor : value.toTensorList()) {
      out.push_back(each(tensor));
    }
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
      out.push_back(tensor ? std::optional(each(*tensor)) : std::nullopt);
    }
    return out;
  }
  return value;
}

// What a hollow operation returns, looked up by what it is given: a GPU's host work has no part in
// which shapes are inferred in Python.
struct Returned {
  std::ptrdiff_t given = -1;  // which tensor of the arguments it is, if it is one; -2: none
  std::vector<std::int64_t> sizes, strides;
  at::ScalarType dtype = at::kFloat;
};
std::unordered_map<std::string, std::vector<Returned>> known;
std::mutex known_lock;

void add_bytes(std::string& key, std::int64_t value) {
  key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

// False of what it cannot describe.
bool describe(const c10::IValue& value, std::string& key) {
  if (value.isTensor() || value.isTensorList() || value.isOptionalTensorList()) {
    mapped(value, [&](const at::Tensor& tensor) {
      key += 't';
      if (tensor.defined()) {
        add_bytes(key, static_cast<std::int64_t>(tensor.scalar_type()));
        add_bytes(key, tensor.dim());
        for (std::int64_t i = 0; i < tensor.dim(); ++i) {
          add_bytes(key, tensor.size(i));
          add_bytes(key, tensor.stride(i));
        }
      }
      return tensor;
    });
    return true;
  }
  if (value.isNone() || value.isDevice() || value.isGenerator()) {
    key += 'n';
  } else if (value.isInt() || value.isBool()) {
    key += 'i';
    add_bytes(key, value.isInt() ? value.toInt() : value.toBool());
  } else if (value.isDouble()) {
    key += 'd';
    add_bytes(key, std::bit_cast<std::int64_t>(value.toDouble()));
  } else if (value.isIntList()) {
    key += 'l';
    for (const std::int64_t each : value.toIntVector()) {
      add_bytes(key, each);
    }
  } else if (value.isBoolList()) {
    key += 'b';
    for (const bool each : value.toBoolList()) {
      key += each ? '1' : '0';
    }
  } else {
    return false;
  }
  return true;
}

// Notes an operation: its name, and of a copy which way it goes and whether the host waits for it.
void serve(const c10::OperatorHandle& op, c10::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::size_t first = stack->size() - schema.arguments().size();
  bool is_view = false;
  for (const c10::Argument& given : schema.returns()) {
    is_view |= given.alias_info() != nullptr && !given.alias_info()->isWrite();
  }
  std::int64_t most = 0;
  bool masked = false;
  for (std::size_t i = first; i < stack->size(); ++i) {
    mapped((*stack)[i], [&](const at::Tensor& tensor) {
      most = std::max(most, tensor.defined() ? tensor.numel() : 0);
      masked |= (*stack)[i].isOptionalTensorList() && tensor.defined() &&
                tensor.scalar_type() == at::kBool;
      return tensor;
    });
  }
  std::string said = schema.name();
  if (said == "aten::copy_") {
    const bool to = on_gpu((*stack)[first].toTensor()),
               from = on_gpu((*stack)[first + 1].toTensor());
    said += to && from ? "" : to ? " to device" : " to host";
    said += (*stack)[first + 2].toBool() ? " unwaited" : "";
  }
  if (!is_view && most > 0) {
    note(said + (masked ? " masked" : ""));
  }
  const bool computed = largest < 0 || is_view || masked || most <= largest;
  std::string key = schema.name() + schema.overload_name();
  std::vector<at::Tensor> tensors;
  bool once = computed;  // whether its results are not kept
  for (std::size_t i = first; !once && i < stack->size(); ++i) {
    once = !describe((*stack)[i], key);
    mapped((*stack)[i], [&](const at::Tensor& tensor) {
      tensors.push_back(tensor);
      once |= tensor.defined() && tensor.numel() == 0;  // it may be given a size
      return tensor;
    });
  }
  if (!once) {
    const std::lock_guard<std::mutex> held(known_lock);
    if (const auto found = known.find(key); found != known.end()) {
      stack->resize(first);
      for (const Returned& each : found->second) {
        stack->emplace_back(each.given == -2 ? at::Tensor()
                            : each.given >= 0
                                ? tensors[each.given]
                                : empty_strided(each.sizes, each.strides, each.dtype, {}, {}, {}));
      }
      return;
    }
  }
  Call call(computed);
  for (std::size_t i = first; i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) {
      value = c10::Device(computed ? at::kCPU : at::kMeta);
    } else if (value.isGenerator()) {
      value = c10::IValue();
    } else {
      value = mapped(value, [&](const at::Tensor& tensor) { return call.stand_in(tensor); });
    }
  }
  op.callBoxed(stack);
  for (std::size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] =
        mapped((*stack)[i], [&](const at::Tensor& found) { return call.result(found, is_view); });
  }
  if (once) {
    return;
  }
  std::vector<Returned> results;
  for (std::size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    if (!(*stack)[i].isTensor()) {
      return;
    }
    const at::Tensor& made = (*stack)[i].toTensor();
    Returned& each = results.emplace_back();
    if (!made.defined()) {
      each.given = -2;
      continue;
    }
    each.sizes = made.sizes().vec(), each.strides = made.strides().vec();
    each.dtype = made.scalar_type();
    for (std::size_t k = 0; k < tensors.size(); ++k) {
      each.given = made.is_same(tensors[k]) ? k : each.given;
    }
  }
  const std::lock_guard<std::mutex> held(known_lock);
  known.emplace(std::move(key), std::move(results));
}

std::vector<std::string> notes(bool on) {
  const std::lock_guard<std::mutex> held(lock);
  noting = on;
  return std::exchange(noted, {});
}

at::Tensor on_cpu(const at::Tensor& tensor) { return Call(true).stand_in(tensor); }

TORCH_LIBRARY(claimed_gpu, m) {
  mallopt(M_MMAP_THRESHOLD, 1 << 20);       // so that what calloc gives is always untouched
  m.def("notes(bool on) -> str[]", notes);  // those since the last call; whether to go on
  m.def("memory() -> int[]", memory);
  m.def("note(str what) -> ()", note);
  m.def("hollow(int above) -> ()", [](std::int64_t above) { largest = above; });
  m.def("on_cpu(Tensor tensor) -> Tensor");  // the same memory
}
TORCH_LIBRARY_IMPL(claimed_gpu, CUDA, m) { m.impl("on_cpu", on_cpu); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  // where a kernel is there for any device, a GPU has its own wherever a CPU has, and for these
  auto& all = c10::Dispatcher::singleton();
  for (const c10::OperatorName& op : all.getAllOpNames()) {
    const bool own = all.findSchema(op)->hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
                     op.name.starts_with("aten::_foreach_") || op.name == "aten::copy_" ||
                     op.name == "aten::convolution" || op.name == "aten::convolution_backward";
    if (own && op.name.starts_with("aten::") && !op.name.starts_with("aten::empty")) {
      const auto name = op.name + (op.overload_name.empty() ? "" : "." + op.overload_name);
      m.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&serve>());
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&serve>()); }

}  // namespace
