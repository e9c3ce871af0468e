// Every operation of the device that is no view and no copy: the shapes of its results
// come from the meta device, its kernel is the CPU's and runs later, on the stream.
#include "tensors.h"
#include "traits.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <set>
#include <string>

namespace simgpu {
namespace {

using torch::jit::Stack;

template <class F>
c10::IValue with_tensors(const c10::IValue& value, F f) {
  if (value.isTensor())
    return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& each : value.toTensorList())
      made.push_back(f(each));
    return made;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const std::optional<at::Tensor>& each : value.toOptionalTensorList())
      made.push_back(each ? std::optional(f(*each)) : std::nullopt);
    return made;
  }
  return value;
}

template <class F>
Stack with_tensors(const Stack& values, c10::Device device, F f) {
  Stack made;
  for (const auto& value : values)
    made.push_back(
        value.isDevice() ? c10::IValue(device) : with_tensors(value, f));
  return made;
}

// The device that a call is for. Tensors of the CPU without dimensions are numbers.
c10::Device device_of(const Traits& traits, const Stack& args) {
  std::optional<c10::Device> found, asked;
  bool has_cpu = false;
  for (const auto& value : args) {
    if (value.isDevice())
      asked = value.toDevice();
    with_tensors(value, [&](const at::Tensor& t) {
      if (is_ours(t)) {
        TORCH_CHECK(
            !found || *found == t.device(),
            "Expected all tensors to be on the same device, but found at least two "
            "devices, ", *found, " and ", t.device(), "! (", traits.name, ")");
        found = t.device();
      } else if (t.defined() && t.dim() > 0 && !value.isOptionalTensorList())
        has_cpu = true;
      return t;
    });
  }
  TORCH_CHECK(
      !found || !has_cpu,
      "Expected all tensors to be on the same device, but found at least two devices, ",
      *found, " and cpu! (", traits.name, ")");
  return given_or_current(found ? found : asked);
}

// What the kernel gets: addresses of the device's tensors, and copies of numbers.
at::Tensor argument(const at::Tensor& t) {
  if (!t.defined())
    return t;
  if (!is_ours(t)) {
    auto kept = t.clone();
    if (t.unsafeGetTensorImpl()->is_wrapped_number())
      kept.unsafeGetTensorImpl()->set_wrapped_number(true);
    return kept;
  }
  return address_of(t);
}

at::Tensor meta_argument(const at::Tensor& t) {
  const bool is_number = t.defined() && t.dim() == 0 && !is_ours(t);
  return t.defined() && !is_number ? meta_of(t) : t;
}

at::Tensor ones_argument(const at::Tensor& t) {
  return is_ours(t) ? ones_like(t) : t;
}

std::vector<at::Tensor> flat(const Stack& values, const std::vector<int>& returned) {
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < values.size(); ++i)
    if (returned.at(i) < 0)
      with_tensors(values[i], [&](const at::Tensor& t) {
        found.push_back(t);
        return t;
      });
  return found;
}

// Runs the CPU's kernel and puts its results where they belong.
void run(
    const c10::OperatorHandle& op, const Traits& traits, Stack args,
    const std::vector<at::Tensor>& targets) {
  const bool counts_integers = traits.name == "aten::histc" &&
      !args[0].toTensor().is_floating_point(); // as CUDA does, and the CPU does not
  if (counts_integers)
    args[0] = args[0].toTensor().to(at::kDouble);
  op.callBoxed(args);
  if (counts_integers)
    args[0] = args[0].toTensor().to(targets[0].scalar_type());
  const auto made = flat(args, traits.returned);
  TORCH_CHECK(made.size() == targets.size(), "simgpu: ", traits.name, ": results");
  for (size_t i = 0; i < made.size(); ++i) {
    if (!made[i].defined() || !targets[i].defined())
      continue;
    TORCH_CHECK(
        made[i].sizes() == targets[i].sizes() &&
            made[i].scalar_type() == targets[i].scalar_type(),
        "simgpu: the meta device says that ", traits.name, " gives ",
        targets[i].scalar_type(), targets[i].sizes(), ", the CPU gives ",
        made[i].scalar_type(), made[i].sizes());
    targets[i].copy_(made[i]);
  }
}

// A CPU generator in the state that the device's is in now, whose own state moves on as
// if the kernel had drawn: how much it draws depends on shapes alone.
void draw(const c10::OperatorHandle& op, const Traits& traits, const Stack& device_args,
          Stack& args, c10::Device device) {
  const auto& given = args[traits.generator];
  auto& generator = cpu_generator(
      given.isNone() ? default_generator(device.index()) : given.toGenerator());
  auto state = generator.clone();
  auto rehearsal = with_tensors(device_args, c10::Device(at::kCPU), ones_argument);
  rehearsal[traits.generator] = generator;
  op.callBoxed(rehearsal);
  args[traits.generator] = state;
}

struct Call {
  c10::OperatorHandle op;
  const Traits& traits;
  Stack given;
  c10::Device device;
  Stack args; // for the kernel
};

// With masks among the indices the host needs to know how many are set; with indices in
// host memory it waits for their copy.
std::optional<Sync> waits_for_indices(const Call& call) {
  std::optional<Sync> found;
  if (call.traits.indexing)
    with_tensors(call.given.at(1), [&](const at::Tensor& t) {
      if (t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte))
        found = Sync::shape;
      else if (t.defined() && !is_ours(t) && !found)
        found = Sync::copy;
      return t;
    });
  return found;
}

Stack shapes(const Call& call) {
  auto made = call.traits.from_cpu
      ? with_tensors(call.given, c10::Device(at::kCPU), ones_argument)
      : with_tensors(call.given, c10::Device(at::kMeta), meta_argument);
  if (call.traits.generator >= 0)
    made[call.traits.generator] = c10::IValue();
  call.op.callBoxed(made);
  return made;
}

// The result number `i`, of which the shape is known: a new tensor, or an argument,
// which may have to grow.
at::Tensor target(Call& call, size_t i, const at::Tensor& shape) {
  const int of = call.traits.returned[i];
  if (!shape.defined() || (of >= 0 && !call.given[of].isTensor()))
    return shape;
  if (of < 0)
    return empty_like(shape, call.device);
  const auto& out = call.given[of].toTensor();
  if (is_ours(out) && out.sizes() != shape.sizes()) {
    resize_to(out, shape.sizes());
    auto* impl = out.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(shape.sizes(), shape.strides());
    call.args[of] = address_of(out);
  }
  return out;
}

Stack run_later(Call& call) {
  const auto& traits = call.traits;
  Stack results(traits.returned.size());
  if (!traits.only_writes ||
      call.op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) {
    const auto known = shapes(call);
    for (size_t i = 0; i < known.size(); ++i)
      results[i] = with_tensors(
          known[i], [&](const at::Tensor& shape) { return target(call, i, shape); });
  }
  if (traits.generator >= 0)
    draw(call.op, traits, call.given, call.args, call.device);
  auto targets = flat(results, traits.returned);
  for (auto& each : targets)
    each = each.defined() ? address_of(each) : each;
  push(
      current_queue(call.device.index()),
      [op = call.op, &traits, args = std::move(call.args),
       targets = std::move(targets)] { run(op, traits, args, targets); },
      traits.name.c_str());
  return results;
}

Stack run_at_once(Call& call) {
  const auto& traits = call.traits;
  auto& queue = current_queue(call.device.index());
  auto& results = call.args;
  if (traits.generator >= 0) {
    auto& given = results[traits.generator];
    given = cpu_generator(
        given.isNone() ? default_generator(call.device.index()) : given.toGenerator());
  }
  call.op.callBoxed(results);
  for (size_t i = 0; i < results.size(); ++i)
    results[i] = with_tensors(results[i], [&](const at::Tensor& made) {
      if (traits.returned[i] >= 0 || !made.defined())
        return made;
      auto target = empty_like(made, call.device);
      push(
          queue, [to = address_of(target), made] { to.copy_(made); },
          traits.name.c_str());
      return target;
    });
  return results;
}

void call(const c10::OperatorHandle& op, Stack* stack) {
  const auto& traits = traits_of(op);
  const auto num = op.schema().arguments().size();
  Stack given(stack->end() - num, stack->end());
  const auto device = device_of(traits, given);
  c10::DeviceGuard guard(device);
  auto args = with_tensors(given, c10::Device(at::kCPU), argument);
  Call call{op, traits, std::move(given), device, std::move(args)};
  auto reason = waits_for_indices(call);
  const bool at_once = traits.at_once || reason == Sync::shape;
  if (at_once || traits.waits)
    reason = Sync::shape;
  if (reason)
    wait(end_of(current_queue(device.index())), *reason);
  auto results = at_once ? run_at_once(call) : run_later(call);
  for (size_t i = 0; i < traits.returned.size(); ++i)
    if (traits.returned[i] >= 0)
      results[i] = call.given[traits.returned[i]];
  torch::jit::drop(*stack, num);
  for (auto& each : results)
    stack->push_back(std::move(each));
}

} // namespace

void register_kernels() {
  static auto* library = new torch::Library(
      torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  auto names = dispatcher.getAllOpNames();
  const std::set<std::string> more = {
      "aten::scaled_dot_product_attention", "aten::convolution"};
  for (const auto& name : names) {
    if (name.name.rfind("aten::", 0) != 0)
      continue;
    const auto op = dispatcher.findOp(name);
    const bool is_more = more.count(name.name) && name.overload_name.empty();
    if (!op || !(is_more || has_cpu_kernel_of_its_own(*op)))
      continue;
    const auto full =
        name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library->impl(full.c_str(), torch::CppFunction::makeFromBoxedFunction<&call>());
  }
}

} // namespace simgpu

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&simgpu::call>());
}
