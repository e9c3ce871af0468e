// Operations that are not like most: which they are, and what their schemas say.
#include "traits.h"

#include <c10/util/Exception.h>

#include <mutex>
#include <set>
#include <unordered_map>

namespace simgpu {
namespace {

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
      TORCH_CHECK(alias->isWrite(), "simgpu: no such view: ", found.name);
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

} // namespace

const Traits& traits_of(const c10::OperatorHandle& op) {
  static std::mutex lock;
  static auto* known = new std::unordered_map<c10::OperatorHandle, Traits>();
  std::lock_guard guard(lock);
  auto found = known->find(op);
  if (found == known->end())
    found = known->emplace(op, examine(op)).first;
  return found->second;
}

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

} // namespace simgpu
