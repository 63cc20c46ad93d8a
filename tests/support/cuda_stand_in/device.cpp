// A CUDA device whose memory is the host's and whose operators are the CPU's.
//
// Tensors on it say that they are on cuda:0, and torch treats them so: an operator that is given one of them
// and a tensor of the host is refused, as a real device would. Nothing here is fast, and nothing overlaps.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IValue;
using c10::Storage;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);

// One stream, on which everything is done as soon as it is asked for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, kDevice); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, kDevice); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    static int any;
    *event = &any;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex current_device() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  // Random numbers are the host's.
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(std::max<size_t>(size, 1));
    return {data, data, &release, kDevice};
  }
  static void release(void* data) { c10::GetCPUAllocator()->raw_deallocate(data); }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
};

Allocator allocator;
c10::impl::DeviceGuardImplRegistrar registered_guard(DeviceType::CUDA, new Guard());
const bool has_allocator = (c10::SetAllocator(DeviceType::CUDA, &allocator), true);

// The same bytes as a storage of another device; they live as long as either does.
Storage shared(const Storage& storage, Device device, c10::Allocator* with) {
  auto release = [](void* kept) { delete static_cast<Storage*>(kept); };
  c10::DataPtr data(const_cast<void*>(storage.data()), new Storage(storage), release, device);
  return Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data), with, true);
}

at::Tensor tensor_in(Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_host(const at::Tensor& tensor) {
  auto made = tensor_in(
      shared(tensor.storage(), at::kCPU, c10::GetCPUAllocator()), c10::DispatchKey::CPU, tensor);
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor on_device(const at::Tensor& tensor, std::optional<Storage> same = std::nullopt) {
  auto storage = same ? *same : shared(tensor.storage(), kDevice, &allocator);
  return tensor_in(std::move(storage), c10::DispatchKey::CUDA, tensor);
}

// Applies a function to every tensor in a value.
template <class Function>
IValue each(const IValue& value, const Function& function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const auto& tensor : value.toTensorVector()) list.push_back(function(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) {
      list.push_back(tensor ? std::optional<at::Tensor>(function(*tensor)) : std::nullopt);
    }
    return list;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> lists;
    for (const auto& inner : value.toListRef()) {
      c10::List<at::Tensor> list;
      for (const auto& tensor : inner.toTensorVector()) list.push_back(function(tensor));
      lists.push_back(list);
    }
    return lists;
  }
  return value;
}

// Makes `written` what the operator left in its alias on the host, which it may have enlarged.
void adopt(const at::Tensor& written, const at::Tensor& host) {
  if (host.sizes() == written.sizes() && host.storage().data() == written.storage().data()) return;
  auto* tensor = written.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(on_device(host).storage());
  tensor->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
}

// Every operator without a kernel of its own below: the CPU's, on aliases of the arguments.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // A real device takes indices from the host too.
  static const std::set<std::string> mixes = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  const auto& schema = op.schema();
  const auto num_arguments = schema.arguments().size(), first = stack->size() - num_arguments;
  std::map<const void*, Storage> storages;
  std::vector<at::Tensor> given(num_arguments);
  bool has_device = false, has_host = false;
  for (size_t index = 0; index < num_arguments; ++index) {
    auto& value = (*stack)[first + index];
    if (value.isTensor()) given[index] = value.toTensor();
    if (value.isDevice()) value = Device(at::kCPU);
    value = each(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return tensor;
      if (!tensor.is_cuda()) {
        has_host |= tensor.dim() > 0;  // a number may come from anywhere
        return tensor;
      }
      has_device = true;
      storages.emplace(tensor.storage().data(), tensor.storage());
      return on_host(tensor);
    });
  }
  TORCH_CHECK(
      !(has_device && has_host) || mixes.count(schema.name()),
      "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
      schema.name(), ")");
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(stack);
  }
  const auto start = stack->size() - schema.returns().size();
  for (size_t index = 0; index < schema.returns().size(); ++index) {
    auto& value = (*stack)[start + index];
    const auto* alias = schema.returns()[index].alias_info();
    if (alias && alias->isWrite() && value.isTensor()) {
      for (size_t place = 0; place < num_arguments; ++place) {
        const auto* of = schema.arguments()[place].alias_info();
        if (!of || !(*of == *alias) || !given[place].defined()) continue;
        if (given[place].is_cuda()) adopt(given[place], value.toTensor());
        value = given[place];
      }
      continue;
    }
    value = each(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined() || tensor.is_cuda()) return tensor;
      const auto found = storages.find(tensor.storage().data());
      return on_device(tensor, found == storages.end() ? std::nullopt : std::optional(found->second));
    });
  }
}

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Format = std::optional<at::MemoryFormat>;

at::Tensor empty(
    c10::SymIntArrayRef size, Dtype dtype, Layout, std::optional<Device>, std::optional<bool>, Format format) {
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, Dtype dtype, Layout, std::optional<Device>,
    std::optional<bool>) {
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::CUDA), dtype.value_or(at::get_default_dtype_as_scalartype()));
}

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool) {
  auto target = self.is_cuda() ? on_host(self) : self;
  target.copy_(source.is_cuda() ? on_host(source) : source);
  return self;
}

at::Tensor to_copy(
    const at::Tensor& self, Dtype dtype, Layout, std::optional<Device> device, std::optional<bool>, bool,
    Format format) {
  const bool to_device = device ? device->is_cuda() : self.is_cuda();
  auto host = self.is_cuda() ? on_host(self) : self;
  auto made = at::_to_copy(host, dtype, std::nullopt, std::nullopt, std::nullopt, false, format);
  return to_device ? on_device(made) : made;
}

at::Tensor as_strided(
    const at::Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }

at::Scalar number(const at::Tensor& self) { return on_host(self).item(); }

void resize_storage(at::Tensor tensor, int64_t num_bytes) {
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto fresh = allocator.allocate(num_bytes);
  std::memcpy(fresh.get(), storage->data(), std::min<size_t>(num_bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(num_bytes);
}

const at::Tensor& resize_(const at::Tensor& self, at::IntArrayRef size, Format) {
  const auto num_bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (static_cast<size_t>(num_bytes) > self.storage().nbytes()) resize_storage(self, num_bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

at::Tensor& set_part(
    at::Tensor& self, Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(source));
  tensor->set_sizes_contiguous(size);
  tensor->set_storage_offset(offset);
  if (!stride.empty()) tensor->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole(at::Tensor& self, Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes()) / self.element_size();
  return set_part(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_part(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_to_copy", TORCH_FN(to_copy));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("view", TORCH_FN(view));
  library.impl("_local_scalar_dense", TORCH_FN(number));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("set_.source_Storage", TORCH_FN(set_whole));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_part));
  library.impl("set_.source_Tensor", TORCH_FN(set_tensor));
}

// Collectives and messages go through gloo.
TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
  for (const char* name :
       {"send", "recv_", "broadcast_", "allreduce_", "allreduce_coalesced_", "allgather_", "_allgather_base_",
        "allgather_into_tensor_coalesced_", "reduce_scatter_", "_reduce_scatter_base_",
        "reduce_scatter_tensor_coalesced_", "reduce_", "gather_", "scatter_", "alltoall_", "alltoall_base_"}) {
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

TORCH_LIBRARY(cuda_stand_in, library) {
  library.def("on_host(Tensor(a) self) -> Tensor(a)");
  library.def("resize_storage(Tensor self, int num_bytes) -> ()");
}

TORCH_LIBRARY_IMPL(cuda_stand_in, CompositeExplicitAutograd, library) {
  library.impl("on_host", TORCH_FN(on_host));
  library.impl("resize_storage", TORCH_FN(resize_storage));
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
