// Every operation of the device that is no view and no copy: the shapes of its results
// come from the meta device, its kernel is the CPU's and runs later, on the stream.
#include "tensors.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

namespace simgpu {
namespace {

using torch::jit::Stack;

// The shapes of these depend on values, or their draws do: they are done at once.
const std::set<std::string> kAtOnce = {
    "aten::nonzero",          "aten::nonzero.out",
    "aten::masked_select",    "aten::masked_select.out",
    "aten::_unique",          "aten::_unique2",
    "aten::unique_dim",       "aten::unique_consecutive",
    "aten::unique_dim_consecutive",
    "aten::bincount",         "aten::poisson",
    "aten::binomial",         "aten::_standard_gamma",
    "aten::_sample_dirichlet"};
// The meta device lays results of these out in another way than the CPU, or knows less
// of them: their shapes come from a run on ones.
const std::set<std::string> kShapesFromCpu = {
    "aten::scaled_dot_product_attention", "aten::convolution",
    "aten::native_batch_norm", "aten::native_layer_norm",
    "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit.no_stats"};
// Index tensors of these may be on the CPU, as with CUDA.
const std::set<std::string> kIndexing = {
    "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index.Tensor", "aten::index.Tensor_out"};
const std::set<std::string> kWaitsInCuda = {"aten::multinomial"};

struct Traits {
  std::string name;
  bool at_once = false;
  bool from_cpu = false;
  bool indexing = false;
  bool waits = false;
  bool only_writes = true; // all results are arguments
  int generator = -1; // index of the argument
  std::vector<int> returned; // argument that a result is, or -1
};

Traits examine(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  Traits found;
  found.name = schema.name();
  if (!schema.overload_name().empty())
    found.name += "." + schema.overload_name();
  found.from_cpu = kShapesFromCpu.count(found.name);
  found.indexing = kIndexing.count(found.name);
  found.waits = kWaitsInCuda.count(found.name);
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); ++i)
    if (arguments[i].type()->str().rfind("Generator", 0) == 0) // or "Generator?"
      found.generator = int(i);
  for (const auto& result : schema.returns()) {
    int of = -1;
    if (const auto* alias = result.alias_info()) {
      TORCH_CHECK(alias->isWrite(), "simgpu: ", found.name, " is a view it does not know");
      for (size_t i = 0; i < arguments.size(); ++i)
        if (const auto* other = arguments[i].alias_info();
            other && other->beforeSets() == alias->beforeSets())
          of = int(i);
    }
    const auto type = result.type()->str();
    if (of < 0 && type.rfind("Tensor", 0) != 0) // nor "Tensor[]"
      found.at_once = true; // a number, for the host
    found.only_writes = found.only_writes && of >= 0;
    found.returned.push_back(of);
  }
  const bool has_meta = op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta);
  if (kAtOnce.count(found.name) || (!has_meta && !found.from_cpu && !found.only_writes))
    found.at_once = true;
  return found;
}

const Traits& traits_of(const c10::OperatorHandle& op) {
  static std::mutex lock;
  static auto* known = new std::unordered_map<c10::OperatorHandle, Traits>();
  std::lock_guard guard(lock);
  auto found = known->find(op);
  if (found == known->end())
    found = known->emplace(op, examine(op)).first;
  return found->second;
}

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
    kept.unsafeGetTensorImpl()->set_wrapped_number(
        t.unsafeGetTensorImpl()->is_wrapped_number());
    return kept;
  }
  return address_of(t);
}

at::Tensor meta_argument(const at::Tensor& t) {
  if (!is_ours(t))
    return t;
  return meta_of(t);
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

bool has_masks(const Traits& traits, const Stack& args) {
  bool found = false;
  if (traits.indexing)
    with_tensors(args.at(1), [&](const at::Tensor& t) {
      if (t.defined() && (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte))
        found = true;
      return t;
    });
  return found;
}

Stack shapes(const c10::OperatorHandle& op, const Traits& traits, const Stack& args) {
  auto made = traits.from_cpu
      ? with_tensors(args, c10::Device(at::kCPU), ones_argument)
      : with_tensors(args, c10::Device(at::kMeta), meta_argument);
  if (traits.generator >= 0)
    made[traits.generator] = c10::IValue();
  op.callBoxed(made);
  return made;
}

void call(const c10::OperatorHandle& op, Stack* stack) {
  const auto& traits = traits_of(op);
  const auto num = op.schema().arguments().size();
  const Stack given(stack->end() - num, stack->end());
  const auto device = device_of(traits, given);
  c10::DeviceGuard guard(device);
  auto& queue = current_queue(device.index());
  auto args = with_tensors(given, c10::Device(at::kCPU), argument);
  const bool at_once = traits.at_once || has_masks(traits, given);
  if (traits.waits)
    wait(end_of(queue), Sync::shape);

  Stack results;
  if (at_once) {
    wait(end_of(queue), Sync::shape);
    if (traits.generator >= 0)
      args[traits.generator] = cpu_generator(
          args[traits.generator].isNone() ? default_generator(device.index())
                                          : args[traits.generator].toGenerator());
    op.callBoxed(args);
    for (size_t i = 0; i < args.size(); ++i)
      results.push_back(with_tensors(args[i], [&](const at::Tensor& made) {
        if (traits.returned[i] >= 0 || !made.defined())
          return made;
        auto target = empty_like(made, device);
        push(queue, [to = address_of(target), made] { to.copy_(made); });
        return target;
      }));
  } else {
    if (!traits.only_writes || op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) {
      auto metas = shapes(op, traits, given);
      for (size_t i = 0; i < metas.size(); ++i)
        results.push_back(with_tensors(metas[i], [&](const at::Tensor& meta) {
          if (!meta.defined())
            return meta;
          if (const int of = traits.returned[i]; of >= 0) {
            const auto& out = given[of].isTensor() ? given[of].toTensor() : meta;
            if (is_ours(out) && out.sizes() != meta.sizes()) {
              resize_to(out, meta.sizes());
              out.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
              args[of] = address_of(out);
            }
            return out;
          }
          return empty_like(meta, device);
        }));
    } else {
      results.resize(traits.returned.size());
    }
    if (traits.generator >= 0)
      draw(op, traits, given, args, device);
    std::vector<at::Tensor> targets = flat(results, traits.returned);
    for (auto& each : targets)
      each = each.defined() ? address_of(each) : each;
    push(queue, [op, &traits, args = std::move(args), targets = std::move(targets)] {
      run(op, traits, args, targets);
    });
  }
  for (size_t i = 0; i < traits.returned.size(); ++i)
    if (traits.returned[i] >= 0)
      results[i] = given[traits.returned[i]];
  torch::jit::drop(*stack, num);
  for (auto& each : results)
    stack->push_back(std::move(each));
}

// Where torch would put an operation together from others though the CPU has a kernel
// of its own, ours is the CPU's: else the last bits differ.
bool has_cpu_kernel_of_its_own(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  if (!op.hasSchema() || !op.hasKernelForDispatchKey(DispatchKey::CPU) ||
      op.hasKernelForDispatchKey(DispatchKey::PrivateUse1))
    return false;
  for (const auto& each : op.schema().returns())
    if (const auto* alias = each.alias_info(); alias && !alias->isWrite())
      return false;
  return op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
      op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional) ||
      op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
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
