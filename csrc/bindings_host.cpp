// Python's view of the host backend. Tensors cross as addresses; only this file knows Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_common.h"
#include "host/communicator.h"

namespace py = pybind11;

namespace moe_ep {
namespace {

using Address = std::tuple<std::int64_t, std::int64_t, std::uint64_t, std::uint64_t, std::uint64_t>;

HeapLayout heap_layout(std::size_t num_ranks, std::size_t num_experts, std::size_t pool_bytes,
                       std::size_t overflow_bytes, std::size_t low_receive_bytes, std::size_t low_rows_bytes) {
  const LowLayout low = LowLayout::make(0, num_ranks, num_experts, low_receive_bytes, low_rows_bytes);
  return HeapLayout::make(num_ranks, num_experts, pool_bytes, overflow_bytes, low.end());
}

std::shared_ptr<Pool> make_heap(const std::string& directory, std::size_t num_ranks, std::size_t num_experts,
                                std::size_t pool_bytes, std::size_t overflow_bytes, std::size_t low_receive_bytes,
                                std::size_t low_rows_bytes) {
  const HeapLayout layout =
      heap_layout(num_ranks, num_experts, pool_bytes, overflow_bytes, low_receive_bytes, low_rows_bytes);
  const LowLayout low = LowLayout::make(layout.low(), num_ranks, num_experts, low_receive_bytes, low_rows_bytes);
  return std::make_shared<Pool>(Segment::create(directory, layout.total_bytes()), layout, low);
}

Address heap_address(const Pool& heap) {
  const SegmentAddress address = heap.segment().address();
  return {address.pid, address.descriptor, address.device, address.inode, address.bytes};
}

// A communicator and the peers' segments that it reads and writes.
class HostCommunicator {
 public:
  HostCommunicator(std::shared_ptr<Pool> heap, int rank, const std::vector<Address>& addresses,
                   std::vector<std::int32_t> expert_to_rank, std::int64_t alignment, bool two_stage,
                   std::size_t num_threads, double timeout_s, std::int64_t low_tokens, int low_layout,
                   bool mask_on_timeout) {
    std::vector<std::uint8_t*> bases;
    std::vector<PeerProcess> processes;
    for (std::size_t i = 0; i < addresses.size(); ++i) {
      const SegmentAddress address{std::get<0>(addresses[i]), std::get<1>(addresses[i]), std::get<2>(addresses[i]),
                                   std::get<3>(addresses[i]), std::get<4>(addresses[i])};
      processes.push_back(PeerProcess{address.pid});
      if (static_cast<int>(i) == rank) {
        bases.push_back(heap->segment().base());
        continue;
      }
      segments_.push_back(Segment::open(address));
      bases.push_back(segments_.back().base());
      if (reinterpret_cast<const HeapHeader*>(bases.back())->magic != kHeapMagic) {
        throw Error(ErrorKind::kUnavailable, "the shared memory of rank " + std::to_string(i) +
                                                 " has another format; install one version of the package everywhere");
      }
    }
    auto peers = std::make_unique<Peers>(rank, heap->layout(), std::move(bases), std::move(processes), timeout_s,
                                         check_python_signals);
    communicator_ = std::make_unique<Communicator>(
        std::move(heap), std::move(peers),
        CommunicatorOptions{std::move(expert_to_rank), alignment, two_stage, num_threads,
                            LowLatencyOptions{low_tokens, static_cast<RowLayout>(low_layout), mask_on_timeout}});
  }

  Communicator& get() { return *communicator_; }
  LowLatency& low_latency() { return communicator_->low_latency(); }

 private:
  std::vector<Segment> segments_;
  std::unique_ptr<Communicator> communicator_;
};

TokenArguments token_arguments(std::uintptr_t x, int element, std::optional<std::uintptr_t> scales,
                               std::int64_t num_tokens, std::int64_t hidden, std::uintptr_t topk_idx, std::int64_t topk,
                               std::optional<std::uintptr_t> weights, bool quantize, bool power_of_two) {
  TokenArguments arguments{};
  arguments.x = pointer<const void>(x);
  arguments.element = static_cast<Element>(element);
  arguments.has_scales = scales.has_value();
  arguments.has_weights = weights.has_value();
  arguments.scales = pointer<const float>(scales.value_or(0));
  arguments.num_tokens = num_tokens;
  arguments.hidden = hidden;
  arguments.topk_idx = pointer<const std::int64_t>(topk_idx);
  arguments.topk = topk;
  arguments.weights = pointer<const float>(weights.value_or(0));
  arguments.quantize = quantize;
  arguments.power_of_two = power_of_two;
  return arguments;
}

DispatchResult dispatch(HostCommunicator& self, std::uintptr_t x, int element, std::optional<std::uintptr_t> scales,
                        std::int64_t num_tokens, std::int64_t hidden, std::uintptr_t topk_idx, std::int64_t topk,
                        std::optional<std::uintptr_t> weights, int layout, std::int64_t max_recv_rows, bool quantize,
                        bool power_of_two, std::shared_ptr<Routing> routing) {
  const DispatchArguments arguments{
      token_arguments(x, element, scales, num_tokens, hidden, topk_idx, topk, weights, quantize, power_of_two),
      static_cast<RowLayout>(layout), max_recv_rows, std::move(routing)};
  const py::gil_scoped_release release;
  return self.get().dispatch(arguments);
}

CombineResult combine(HostCommunicator& self, std::uintptr_t rows, int element, std::int64_t hidden,
                      std::shared_ptr<Routing> routing, std::optional<std::uintptr_t> weights,
                      std::optional<std::uintptr_t> values, std::uintptr_t out, std::uintptr_t values_out) {
  CombineArguments arguments{};
  arguments.rows = pointer<const void>(rows);
  arguments.element = static_cast<Element>(element);
  arguments.hidden = hidden;
  arguments.routing = std::move(routing);
  arguments.has_weights = weights.has_value();
  arguments.has_values = values.has_value();
  arguments.weights = pointer<const float>(weights.value_or(0));
  arguments.values = pointer<const float>(values.value_or(0));
  arguments.out = pointer<void>(out);
  arguments.values_out = pointer<float>(values_out);
  const py::gil_scoped_release release;
  return self.get().combine(arguments);
}

std::shared_ptr<LowRouting> send_low_dispatch(HostCommunicator& self, std::uintptr_t x, int element,
                                              std::optional<std::uintptr_t> scales, std::int64_t num_tokens,
                                              std::int64_t hidden, std::uintptr_t topk_idx, std::int64_t topk,
                                              std::optional<std::uintptr_t> weights, bool quantize, bool power_of_two,
                                              std::size_t index) {
  const LowDispatchArguments arguments{
      token_arguments(x, element, scales, num_tokens, hidden, topk_idx, topk, weights, quantize, power_of_two), index};
  const py::gil_scoped_release release;
  return self.low_latency().send_dispatch(arguments);
}

// The receive buffer and the counts.
std::tuple<Block, Block> receive_low_dispatch(HostCommunicator& self, const std::shared_ptr<LowRouting>& routing) {
  const py::gil_scoped_release release;
  LowLatency& low = self.low_latency();
  low.receive_dispatch(*routing);
  return {low.received(routing->operation.index), low.counts(*routing)};
}

std::shared_ptr<LowCombine> send_low_combine(HostCommunicator& self, std::uintptr_t rows, int element,
                                             std::int64_t hidden, std::shared_ptr<LowRouting> routing,
                                             std::uintptr_t topk_idx, std::optional<std::uintptr_t> weights,
                                             bool quantize, bool power_of_two, std::uintptr_t out,
                                             std::uintptr_t lost_weights) {
  LowCombineArguments arguments{};
  arguments.rows = pointer<const void>(rows);
  arguments.element = static_cast<Element>(element);
  arguments.hidden = hidden;
  arguments.routing = std::move(routing);
  arguments.topk_idx = pointer<const std::int64_t>(topk_idx);
  arguments.has_weights = weights.has_value();
  arguments.weights = pointer<const float>(weights.value_or(0));
  arguments.quantize = quantize;
  arguments.power_of_two = power_of_two;
  arguments.out = pointer<void>(out);
  arguments.lost_weights = pointer<float>(lost_weights);
  const py::gil_scoped_release release;
  return self.low_latency().send_combine(arguments);
}

void receive_low_combine(HostCommunicator& self, const std::shared_ptr<LowCombine>& combine) {
  const py::gil_scoped_release release;
  self.low_latency().receive_combine(*combine);
}

py::buffer_info block_buffer(Block& block) {
  return py::buffer_info(block.data, 1, py::format_descriptor<std::uint8_t>::format(),
                         static_cast<py::ssize_t>(block.bytes));
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Shared-memory dispatch and combine between the processes of one machine.";
  py::register_exception_translator(translate_error);

  py::class_<Block>(module, "Block", py::buffer_protocol()).def_buffer(&block_buffer);
  py::class_<Pool, std::shared_ptr<Pool>>(module, "Heap")
      .def(py::init(&make_heap), py::kw_only(), py::arg("directory"), py::arg("num_ranks"), py::arg("num_experts"),
           py::arg("pool_bytes"), py::arg("overflow_bytes"), py::arg("low_receive_bytes") = 0,
           py::arg("low_rows_bytes") = 0)
      .def("address", &heap_address)
      .def("leased_bytes", &Pool::leased_bytes);
  py::class_<Routing, std::shared_ptr<Routing>>(module, "Routing")
      .def_readonly("num_rows", &Routing::num_rows)
      .def_readonly("num_received", &Routing::num_received)
      .def_readonly("tokens_per_local_expert", &Routing::tokens_per_local_expert);
  py::class_<DispatchResult>(module, "DispatchResult")
      .def_readonly("block", &DispatchResult::block)
      .def_property_readonly("scales_offset", [](const DispatchResult& r) { return r.offsets.scales; })
      .def_property_readonly("weights_offset", [](const DispatchResult& r) { return r.offsets.weights; })
      .def_property_readonly("indices_offset", [](const DispatchResult& r) { return r.offsets.indices; })
      .def_property_readonly("routing",
                             [](const DispatchResult& r) { return std::const_pointer_cast<Routing>(r.routing); })
      .def_readonly("copied_out", &DispatchResult::copied_out)
      .def_readonly("bytes_to_peers", &DispatchResult::bytes_to_peers);
  py::class_<CombineResult>(module, "CombineResult")
      .def_readonly("staged", &CombineResult::staged)
      .def_readonly("bytes_to_peers", &CombineResult::bytes_to_peers);
  py::class_<LowRouting, std::shared_ptr<LowRouting>>(module, "LowLatencyRouting")
      .def_readonly("bytes_to_peers", &LowRouting::bytes_to_peers)
      .def_property_readonly("scales_offset", [](const LowRouting& r) { return r.offsets.scales; })
      .def_property_readonly("weights_offset", [](const LowRouting& r) { return r.offsets.weights; })
      .def_property_readonly("indices_offset", [](const LowRouting& r) { return r.offsets.indices; });
  py::class_<LowCombine, std::shared_ptr<LowCombine>>(module, "LowLatencyCombine")
      .def_readonly("staged", &LowCombine::staged)
      .def_readonly("bytes_to_peers", &LowCombine::bytes_to_peers);
  py::class_<HostCommunicator>(module, "Communicator")
      .def(py::init<std::shared_ptr<Pool>, int, const std::vector<Address>&, std::vector<std::int32_t>, std::int64_t,
                    bool, std::size_t, double, std::int64_t, int, bool>(),
           py::arg("heap"), py::kw_only(), py::arg("rank"), py::arg("addresses"), py::arg("expert_to_rank"),
           py::arg("alignment"), py::arg("two_stage"), py::arg("num_threads"), py::arg("timeout_s"),
           py::arg("low_tokens") = 0, py::arg("low_layout") = 0, py::arg("mask_on_timeout") = false)
      .def("dispatch", &dispatch, py::kw_only(), py::arg("x"), py::arg("element"), py::arg("scales"),
           py::arg("num_tokens"), py::arg("hidden"), py::arg("topk_idx"), py::arg("topk"), py::arg("weights"),
           py::arg("layout"), py::arg("max_recv_rows"), py::arg("quantize"), py::arg("power_of_two"),
           py::arg("routing"))
      .def("combine", &combine, py::kw_only(), py::arg("rows"), py::arg("element"), py::arg("hidden"),
           py::arg("routing"), py::arg("weights"), py::arg("values"), py::arg("out"), py::arg("values_out"))
      .def("send_low_latency_dispatch", &send_low_dispatch, py::kw_only(), py::arg("x"), py::arg("element"),
           py::arg("scales"), py::arg("num_tokens"), py::arg("hidden"), py::arg("topk_idx"), py::arg("topk"),
           py::arg("weights"), py::arg("quantize"), py::arg("power_of_two"), py::arg("index"))
      .def("receive_low_latency_dispatch", &receive_low_dispatch, py::arg("routing"))
      .def("send_low_latency_combine", &send_low_combine, py::kw_only(), py::arg("rows"), py::arg("element"),
           py::arg("hidden"), py::arg("routing"), py::arg("topk_idx"), py::arg("weights"), py::arg("quantize"),
           py::arg("power_of_two"), py::arg("out"), py::arg("lost_weights"))
      .def("receive_low_latency_combine", &receive_low_combine, py::arg("combine"))
      .def(
          "low_latency_rows", [](HostCommunicator& self, std::size_t index) { return self.low_latency().rows(index); },
          py::arg("index"))
      .def(
          "low_latency_rows_address",
          [](HostCommunicator& self, std::size_t index) {
            return reinterpret_cast<std::uintptr_t>(self.low_latency().rows_address(index));
          },
          py::arg("index"))
      .def(
          "low_latency_held", [](HostCommunicator& self, std::size_t index) { return self.low_latency().held(index); },
          py::arg("index"))
      .def(
          "mask_ranks", [](HostCommunicator& self, const std::vector<int>& ranks) { self.low_latency().mask(ranks); },
          py::arg("ranks"))
      .def("masked_ranks", [](HostCommunicator& self) { return self.low_latency().masked_ranks(); })
      .def("lease",
           [](HostCommunicator& self, std::size_t bytes) -> py::object {
             Block block = self.get().lease(bytes);
             return block.data == nullptr ? py::none() : py::cast(std::move(block));
           })
      .def("depart", [](HostCommunicator& self, std::uint32_t state, const std::string& text) {
        self.get().depart(state, text);
      });
  module.def(
      "heap_bytes",
      [](std::size_t num_ranks, std::size_t num_experts, std::size_t pool_bytes, std::size_t overflow_bytes,
         std::size_t low_receive_bytes, std::size_t low_rows_bytes) {
        const HeapLayout layout =
            heap_layout(num_ranks, num_experts, pool_bytes, overflow_bytes, low_receive_bytes, low_rows_bytes);
        return std::make_tuple(layout.control_bytes(), layout.total_bytes());
      },
      py::arg("num_ranks"), py::arg("num_experts"), py::arg("pool_bytes"), py::arg("overflow_bytes"),
      py::arg("low_receive_bytes") = 0, py::arg("low_rows_bytes") = 0,
      "Bytes of the control region and of the whole heap.");
  module.def(
      "kernel_variant", [] { return std::string(kernels().name); },
      "Which build of the row kernels this processor runs.");
}

}  // namespace moe_ep
