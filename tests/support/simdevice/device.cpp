// "sim": an accelerator that is not there, as a PyTorch backend, to rehearse what a GPU would be asked for.
//
// As strict as CUDA: the host cannot read its addresses (memory.h), an operator takes tensors of one device and no
// generator of the host's (but 0-dim tensors and indices of the host), and fresh memory is NaN. Everything is computed by
// the CPU's operators on the same bytes.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <set>

#include "registration.h"

using at::Tensor;
using c10::Device;
using c10::IntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Boxed = std::vector<c10::IValue>;

// ---------------------------------------------------------------- making, moving and viewing tensors
static const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

static Tensor empty(IntArrayRef size, Dtype dtype, Layout, std::optional<Device> device, std::optional<bool> pinned,
                    std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "only dense CPU tensors can be pinned");
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Dtype dtype, Layout, std::optional<Device> device,
                            std::optional<bool>) {
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}
static Tensor copy_from(const Tensor& self, const Tensor& target, bool non_blocking) {
    bool from = self.device().is_privateuseone(), to = target.device().is_privateuseone();
    long bytes = self.numel() * self.element_size();
    if (from && to) {
        note("launch", "copy_", bytes);
    } else {
        note(from ? "to_host" : "to_device", "copy_", bytes);
        // CUDA too waits for a copy from memory that is not pinned, unless it is told not to.
        if (!non_blocking) note("sync", from ? "copy_ to the host" : "copy_ from the host", bytes);
    }
    Simulating here;
    on_host(target).copy_(on_host(self));
    return target;
}
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& target) {
    const c10::DeviceGuard guard(target.device());
    at::native::resize_(target, self.sizes(), std::nullopt);
    on_host(target).copy_(on_host(self));
    return target;
}
static at::Scalar local_scalar(const Tensor& self) {
    note("sync", "item", self.element_size());
    return on_host(self).item();
}
static const Tensor& resize(const Tensor& self, IntArrayRef size, std::optional<at::MemoryFormat> format) {
    const c10::DeviceGuard guard(self.device());
    return at::native::resize_(self, size, format);
}
static Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
    return at::cpu::set_(self, source, offset, size, stride);
}
static Tensor& set_whole_storage(Tensor& self, at::Storage source) {
    int64_t count = source.nbytes() / self.element_size();
    return at::cpu::set_(self, source, 0, {count}, {1});
}
static Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }
static Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
    return at::native::_reshape_alias(self, size, stride);
}
static Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
    return at::cpu::as_strided(self, size, stride, offset);
}
static Tensor unfold(const Tensor& self, int64_t dimension, int64_t size, int64_t step) {
    return at::native::unfold(self, dimension, size, step);
}

// ---------------------------------------------------------------- what every operator is held to
// Operators for which CUDA's host waits, besides copies to the host and item().
static const std::set<std::string> WAITING = {
    "aten::nonzero",      "aten::masked_select",      "aten::_unique2",  "aten::unique_dim",
    "aten::bincount",     "aten::unique_consecutive", "aten::equal",     "aten::repeat_interleave.Tensor",
    "aten::_linalg_eigh", "aten::linalg_eigh",        "aten::cholesky_inverse",
};

static void check_devices(const c10::OperatorHandle& operation, const Boxed& values) {
    const auto& arguments = operation.schema().arguments();
    const std::string& name = operation.schema().name();
    std::optional<Device> device;
    auto look = [&](const Tensor& tensor, bool may_be_host) {
        if (!tensor.defined() || tensor.is_meta() || (tensor.is_cpu() && (tensor.dim() == 0 || may_be_host))) return;
        if (!device) device = tensor.device();
        TORCH_CHECK(*device == tensor.device(), "Expected all tensors to be on the same device, but found at least two",
                    " devices, ", *device, " and ", tensor.device(), "! (in ", name, ")");
    };
    auto first = values.size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) {
        const auto& value = values[first + i];
        bool indices = arguments[i].name() == "indices" && name.find("index") != std::string::npos;
        if (value.isTensor()) {
            look(value.toTensor(), false);
        } else if (value.isTensorList()) {
            for (const Tensor& tensor : value.toTensorVector()) look(tensor, false);
        } else if (value.isOptionalTensorList()) {
            for (const std::optional<Tensor> tensor : value.toOptionalTensorList())
                if (tensor) look(*tensor, indices);
        } else if (value.isGenerator() && value.toGenerator().device().is_cpu()) {
            TORCH_CHECK(!device || !device->is_privateuseone(),
                        "Expected a 'sim' device type for generator but found 'cpu' (in ", name, ")");
        }
    }
}
static void note_indices(const std::string& name, const Boxed& values) {
    if (name != "aten::index" && name != "aten::index_put_" && name != "aten::_index_put_impl_") return;
    for (const auto& value : values) {
        if (!value.isOptionalTensorList()) continue;
        for (const std::optional<Tensor> index : value.toOptionalTensorList()) {
            if (!index || !index->defined()) continue;
            bool mask = index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
            if (mask || index->is_cpu()) note("sync", name + (mask ? " by a mask" : " by the host's indices"), 0);
        }
    }
}
static long launches = 0;
static void compute(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
    const std::string& name = operation.schema().name();
    launches++;
    check_devices(operation, *stack);
    note("launch", name, 0);
    if (WAITING.count(name)) note("sync", name, 0);
    note_indices(name, *stack);
    Simulating here;
    at::native::cpu_fallback(operation, stack);
}

// ---------------------------------------------------------------- convolutions, for which there is no fallback
using Symbols = c10::SymIntArrayRef;
static Tensor convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Symbols stride,
                          Symbols padding, Symbols dilation, bool transposed, Symbols output, c10::SymInt groups) {
    bool biased = bias && bias->defined();
    TORCH_CHECK(x.device() == weight.device() && (!biased || bias->device() == x.device()),
                "Input type and weight type should be the same (a convolution of ", x.device(), " and ", weight.device(), ")");
    note("launch", "aten::convolution", 0);
    Simulating here;
    std::optional<Tensor> added;
    if (biased) added = on_host(*bias);
    return at::convolution_symint(on_host(x), on_host(weight), added, stride, padding, dilation, transposed, output, groups)
        .to(x.device());
}
static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, Symbols stride, Symbols padding, Symbols dilation,
    bool transposed, Symbols output, c10::SymInt groups, std::array<bool, 3> wanted) {
    note("launch", "aten::convolution_backward", 0);
    Simulating here;
    std::vector<c10::SymInt> bias{weight.sym_size(0)};
    auto found = at::convolution_backward_symint(on_host(gradient), on_host(x), on_host(weight), bias, stride, padding,
                                                 dilation, transposed, output, groups, wanted);
    auto back = [&](const Tensor& tensor) { return tensor.defined() ? tensor.to(x.device()) : tensor; };
    return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("resize_", resize);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("_local_scalar_dense", local_scalar);
    m.impl("set_.source_Tensor", at::native::set_tensor_);
    m.impl("set_.source_Storage", set_whole_storage);
    m.impl("set_.source_Storage_storage_offset", set_storage);
    m.impl("view", view);
    m.impl("unfold", unfold);
    m.impl("convolution_overrideable", convolution);
    m.impl("convolution_backward_overrideable", convolution_backward);
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
    AT_FORALL_LOWER_PRECISION_FP(LOWER)
    AT_FORALL_FP32(FULL)
}

// ---------------------------------------------------------------- what Python asks (device.py)
extern "C" {
void sim_count(int on, const char* package) {
    watched = package;
    counting = on;
    if (on) counts.clear();
}
// A line for every kind, line of the package and operator: "kind|file:line|operator|calls|bytes". Valid until the next call.
const char* sim_counts() {
    static std::string told;
    told.clear();
    for (const auto& [key, count] : counts)
        told += key + "|" + std::to_string(count.calls) + "|" + std::to_string(count.bytes) + "\n";
    return told.c_str();
}
// Operators that the device ran since the process began, whether they are being counted or not.
long sim_launches() { return launches; }
long sim_allocated(int device) { return allocated[device]; }
long sim_peak(int device) { return peak[device]; }
void sim_reset_peak(int device) { peak[device] = allocated[device]; }
void sim_limit(long bytes) { memory_limit = bytes; }
void sim_set_devices(int count) { device_count = count; }
int sim_devices() { return device_count; }
int sim_current() { return current_device; }
void sim_set_current(int device) { current_device = device; }
}
