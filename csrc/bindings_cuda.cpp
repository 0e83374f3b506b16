// Python's view of the CUDA backend. Tensors and streams cross as addresses; only this file knows Python.
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_common.h"
#include "cuda/check.h"
#include "cuda/communicator.h"
#include "cuda/fp8_layout.h"

namespace py = pybind11;

namespace moe_ep {
namespace gpu {
namespace {

cudaStream_t stream_of(std::uintptr_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// DLPack's exchange structs (version 0), by which torch takes memory that something else owns.
struct DlTensor {
  void* data;
  std::int32_t device_type;
  std::int32_t device_id;
  std::int32_t num_dimensions;
  std::uint8_t type_code;
  std::uint8_t type_bits;
  std::uint16_t type_lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

constexpr std::int32_t kDlCuda = 2;
constexpr const char* kUnused = "dltensor";

// Part of the heap, and what holds it for as long as the tensor lives. Its end needs no Python.
struct LeasedTensor {
  DlManagedTensor managed;
  std::vector<std::int64_t> shape;
  std::shared_ptr<void> owner;
};

// `type`: DLPack's code and bits of an element.
py::capsule dlpack_of(std::shared_ptr<void> owner, std::uint8_t* data, int device, std::pair<int, int> type,
                      std::vector<std::int64_t> shape) {
  auto* leased = new LeasedTensor{};
  leased->shape = std::move(shape);
  leased->owner = std::move(owner);
  DlTensor& tensor = leased->managed.tensor;
  tensor.data = data;
  tensor.device_type = kDlCuda;
  tensor.device_id = device;
  tensor.num_dimensions = static_cast<std::int32_t>(leased->shape.size());
  tensor.type_code = static_cast<std::uint8_t>(type.first);
  tensor.type_bits = static_cast<std::uint8_t>(type.second);
  tensor.type_lanes = 1;
  tensor.shape = leased->shape.data();
  leased->managed.context = leased;
  leased->managed.deleter = [](DlManagedTensor* self) { delete static_cast<LeasedTensor*>(self->context); };
  return py::capsule(&leased->managed, kUnused, [](PyObject* capsule) {
    // A capsule that was consumed has another name, and its tensor the ownership.
    if (PyCapsule_IsValid(capsule, kUnused) == 0) return;
    auto* managed = static_cast<DlManagedTensor*>(PyCapsule_GetPointer(capsule, kUnused));
    managed->deleter(managed);
  });
}

std::shared_ptr<Pool> make_heap(int device, std::size_t num_ranks, std::size_t num_experts, std::size_t pool_bytes,
                                std::size_t overflow_bytes, std::size_t low_receive_bytes, std::size_t low_rows_bytes) {
  const auto low_at = [&](std::size_t base) {
    return LowLayout::make(base, num_ranks, num_experts, low_receive_bytes, low_rows_bytes);
  };
  const HeapLayout layout = HeapLayout::make(num_ranks, num_experts, pool_bytes, overflow_bytes, low_at(0).end());
  return std::make_shared<Pool>(device, layout, low_at(layout.low()));
}

py::bytes ipc_handle(const Pool& heap) {
  const IpcHandle handle = heap.ipc_handle();
  return py::bytes(handle.data(), handle.size());
}

IpcHandle ipc_handle_of(const std::string& bytes) {
  IpcHandle handle{};
  if (bytes.size() != handle.size()) {
    throw Error(ErrorKind::kUnavailable, "an IPC handle has another size; install one version everywhere");
  }
  std::memcpy(handle.data(), bytes.data(), bytes.size());
  return handle;
}

std::unique_ptr<Communicator> connect(std::shared_ptr<Pool> heap, int rank,
                                      const std::vector<std::pair<std::int64_t, py::bytes>>& peers,
                                      std::vector<std::int32_t> expert_to_rank, std::int64_t alignment, bool two_stage,
                                      std::int64_t max_tokens, double timeout_s, int default_sms, int ranks_on_device,
                                      bool gpu_each, std::int64_t low_tokens, int low_layout, bool mask_on_timeout) {
  std::vector<PeerAddress> addresses;
  for (const auto& [pid, handle] : peers) {
    PeerAddress address{pid, {}};
    if (static_cast<int>(addresses.size()) != rank) address.heap = ipc_handle_of(handle);
    addresses.push_back(address);
  }
  CommunicatorOptions options{std::move(expert_to_rank),
                              alignment,
                              two_stage,
                              max_tokens,
                              timeout_s,
                              default_sms,
                              ranks_on_device,
                              gpu_each,
                              low_tokens,
                              static_cast<RowLayout>(low_layout),
                              mask_on_timeout};
  return std::make_unique<Communicator>(std::move(heap), rank, addresses, std::move(options), check_python_signals);
}

RowSource row_source(std::uintptr_t x, int element, std::optional<std::uintptr_t> scales,
                     std::optional<std::uintptr_t> weights, std::int32_t hidden, bool quantize, bool power_of_two) {
  return RowSource{pointer<const std::uint8_t>(x),
                   pointer<const float>(scales.value_or(0)),
                   pointer<const float>(weights.value_or(0)),
                   hidden,
                   static_cast<Element>(element),
                   quantize,
                   power_of_two};
}

DispatchResult dispatch(Communicator& self, std::uintptr_t x, int element, std::optional<std::uintptr_t> scales,
                        std::int64_t num_tokens, std::int32_t hidden, std::uintptr_t topk_idx, std::int64_t topk,
                        std::optional<std::uintptr_t> weights, int layout, std::int64_t max_recv_rows, bool quantize,
                        bool power_of_two, std::shared_ptr<Routing> routing, std::uintptr_t routing_memory, int num_sms,
                        std::uintptr_t stream, std::uintptr_t home) {
  DispatchArguments arguments{};
  arguments.source = row_source(x, element, scales, weights, hidden, quantize, power_of_two);
  arguments.num_tokens = num_tokens;
  arguments.has_scales = scales.has_value();
  arguments.has_weights = weights.has_value();
  arguments.topk_idx = pointer<const std::int64_t>(topk_idx);
  arguments.topk = topk;
  arguments.layout = static_cast<RowLayout>(layout);
  arguments.max_recv_rows = max_recv_rows;
  arguments.routing = std::move(routing);
  arguments.routing_memory = pointer<void>(routing_memory);
  arguments.num_sms = num_sms;
  arguments.streams = Streams{stream_of(stream), stream_of(home)};
  const py::gil_scoped_release release;
  return self.dispatch(arguments);
}

void expand(Communicator& self, const DispatchResult& staged, int element, std::int32_t hidden, bool fresh, bool beside,
            std::uintptr_t block, int num_sms, int local_sms, std::uintptr_t stream) {
  ExpandArguments arguments{};
  arguments.staged = &staged;
  arguments.element = static_cast<Element>(element);
  arguments.hidden = hidden;
  arguments.fresh = fresh;
  arguments.beside = beside;
  arguments.block = pointer<std::uint8_t>(block);
  arguments.num_sms = num_sms;
  arguments.local_sms = local_sms;
  arguments.streams = Streams{stream_of(stream), stream_of(stream)};
  const py::gil_scoped_release release;
  self.expand(arguments);
}

CombineResult combine(Communicator& self, std::uintptr_t rows, int element, std::int32_t hidden,
                      std::shared_ptr<Routing> routing, std::optional<std::uintptr_t> weights,
                      std::optional<std::uintptr_t> values, std::uintptr_t out, std::uintptr_t values_out, int num_sms,
                      int local_sms, std::uintptr_t stream, std::uintptr_t home) {
  CombineArguments arguments{};
  arguments.rows = pointer<const std::uint8_t>(rows);
  arguments.element = static_cast<Element>(element);
  arguments.hidden = hidden;
  arguments.routing = std::move(routing);
  arguments.has_weights = weights.has_value();
  arguments.has_values = values.has_value();
  arguments.weights = pointer<const float>(weights.value_or(0));
  arguments.values = pointer<const float>(values.value_or(0));
  arguments.out = pointer<std::uint8_t>(out);
  arguments.values_out = pointer<float>(values_out);
  arguments.num_sms = num_sms;
  arguments.local_sms = local_sms;
  arguments.streams = Streams{stream_of(stream), stream_of(home)};
  const py::gil_scoped_release release;
  return self.combine(arguments);
}

void low_dispatch(Communicator& self, std::uintptr_t x, int element, std::optional<std::uintptr_t> scales,
                  std::int64_t num_tokens, std::int32_t hidden, std::uintptr_t topk_idx, std::int64_t topk,
                  std::optional<std::uintptr_t> weights, bool quantize, bool power_of_two,
                  std::uintptr_t routing_memory, int index, bool receives, int num_sms, std::uintptr_t stream) {
  LowDispatchArguments arguments{};
  arguments.source = row_source(x, element, scales, weights, hidden, quantize, power_of_two);
  arguments.num_tokens = num_tokens;
  arguments.has_scales = scales.has_value();
  arguments.has_weights = weights.has_value();
  arguments.topk_idx = pointer<const std::int64_t>(topk_idx);
  arguments.topk = topk;
  arguments.routing_memory = pointer<void>(routing_memory);
  arguments.index = index;
  arguments.num_sms = num_sms;
  arguments.receives = receives;
  arguments.stream = stream_of(stream);
  self.low_dispatch(arguments);
}

bool low_combine(Communicator& self, std::uintptr_t rows, int element, std::int64_t num_tokens, std::int32_t hidden,
                 std::uintptr_t topk_idx, std::int64_t topk, std::optional<std::uintptr_t> weights, bool quantize,
                 bool power_of_two, std::uintptr_t routing_memory, int index, std::uintptr_t out, std::uintptr_t lost,
                 bool sends, bool receives, int num_sms, std::uintptr_t stream) {
  LowCombineArguments arguments{};
  arguments.rows = pointer<const std::uint8_t>(rows);
  arguments.element = static_cast<Element>(element);
  arguments.hidden = hidden;
  arguments.num_tokens = num_tokens;
  arguments.topk_idx = pointer<const std::int64_t>(topk_idx);
  arguments.topk = topk;
  arguments.has_weights = weights.has_value();
  arguments.weights = pointer<const float>(weights.value_or(0));
  arguments.routing_memory = pointer<void>(routing_memory);
  arguments.index = index;
  arguments.quantize = quantize;
  arguments.power_of_two = power_of_two;
  arguments.out = pointer<std::uint8_t>(out);
  arguments.lost = pointer<float>(lost);
  arguments.num_sms = num_sms;
  arguments.halves = sends && receives ? kLowBoth : sends ? kLowSend : kLowReceive;
  arguments.stream = stream_of(stream);
  return self.low_combine(arguments);
}

// Index, CUDA's number and handle of an allocation.
using Offer = std::tuple<int, std::uint64_t, py::bytes>;

std::pair<std::vector<Offer>, std::string> offer_rows(Communicator& self) {
  std::string refused;
  std::vector<Offer> offers;
  for (const RowSegment& segment : self.offer_rows(refused)) {
    offers.emplace_back(segment.index, segment.id, py::bytes(segment.handle.data(), segment.handle.size()));
  }
  return {offers, refused};
}

std::pair<std::vector<int>, std::string> map_rows(Communicator& self, int rank, const std::vector<Offer>& offers) {
  std::string refused;
  std::vector<RowSegment> segments;
  for (const auto& [index, id, handle] : offers) {
    RowSegment segment{};
    segment.index = index;
    segment.id = id;
    segment.handle = ipc_handle_of(handle);
    segments.push_back(segment);
  }
  return {self.map_rows(rank, segments, refused), refused};
}

using Offsets = std::tuple<std::size_t, std::size_t, std::size_t, std::size_t, std::size_t>;

Offsets offsets_of(const ReceiveBlock& block) {
  return {block.rows, block.scales, block.weights, block.indices, block.total};
}

// What tells a device from others, as text that all processes of a machine find alike.
std::string device_uuid(int device) {
  cudaDeviceProp properties{};
  MOE_EP_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (const char byte : properties.uuid.bytes) {
    text += digits[static_cast<unsigned char>(byte) >> 4];
    text += digits[static_cast<unsigned char>(byte) & 15];
  }
  return text;
}

int num_sms_of(int device) {
  int sms = 0;
  MOE_EP_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  return sms;
}

void transpose_fp8_scales(std::uintptr_t scales, std::int64_t row_stride, std::int64_t block_stride,
                          std::int32_t num_blocks, const std::vector<std::int64_t>& rows_per_expert, std::uintptr_t out,
                          int device, std::uintptr_t stream) {
  TransposeScalesParams params{};
  params.scales = RowScales{pointer<const float>(scales), row_stride, block_stride};
  params.num_blocks = num_blocks;
  params.out = pointer<float>(out);
  params.experts = ExpertUnits<kScaleMultiple>::of(rows_per_expert);
  const DeviceGuard guard(device);
  MOE_EP_CUDA_CHECK(launch_transpose_scales(params, stream_of(stream)));
}

void quantize_fp8_columns(std::uintptr_t data, std::int32_t hidden, std::uintptr_t scales, std::int64_t row_stride,
                          std::int64_t block_stride, const std::vector<std::int64_t>& rows_per_expert,
                          bool power_of_two, std::uintptr_t codes, std::uintptr_t column_scales, int device,
                          std::uintptr_t stream) {
  QuantizeColumnsParams params{};
  params.data = pointer<const std::uint8_t>(data);
  params.scales = RowScales{pointer<const float>(scales), row_stride, block_stride};
  params.hidden = hidden;
  params.power_of_two = power_of_two;
  params.codes = pointer<std::uint8_t>(codes);
  params.column_scales = pointer<float>(column_scales);
  params.experts = ExpertUnits<static_cast<int>(kFp8Block)>::of(rows_per_expert);
  const DeviceGuard guard(device);
  MOE_EP_CUDA_CHECK(launch_quantize_columns(params, stream_of(stream)));
}

}  // namespace
}  // namespace gpu

PYBIND11_MODULE(_cuda, module) {
  using namespace gpu;
  module.doc() = "Dispatch and combine between GPUs that can map each other's memory, or on one GPU.";
  py::register_exception_translator(translate_error);

  py::class_<Pool::Lease, std::shared_ptr<Pool::Lease>>(module, "Block")
      .def(
          "dlpack",
          [](const std::shared_ptr<Pool::Lease>& lease, std::size_t offset, std::pair<int, int> type,
             std::vector<std::int64_t> shape) {
            return dlpack_of(lease, lease->data() + offset, lease->device(), type, std::move(shape));
          },
          py::arg("offset"), py::arg("type"), py::arg("shape"))
      .def_property_readonly("device", &Pool::Lease::device)
      .def_property_readonly("data",
                             [](const Pool::Lease& lease) { return reinterpret_cast<std::uintptr_t>(lease.data()); });
  py::class_<Pool, std::shared_ptr<Pool>>(module, "Heap")
      .def(py::init(&make_heap), py::kw_only(), py::arg("device"), py::arg("num_ranks"), py::arg("num_experts"),
           py::arg("pool_bytes"), py::arg("overflow_bytes"), py::arg("low_receive_bytes"), py::arg("low_rows_bytes"))
      .def("ipc_handle", &ipc_handle)
      .def("leased_bytes", &Pool::leased_bytes)
      .def("bytes", [](const Pool& self) { return self.layout().total_bytes(); });
  py::class_<LowBlock>(module, "LowBlock")
      .def_property_readonly("device", [](const LowBlock& self) { return self.hold->pool->device(); })
      .def_property_readonly("offsets", [](const LowBlock& self) { return offsets_of(self.offsets); })
      .def_property_readonly("rows", [](const LowBlock& self) { return self.rows - self.receive; })
      .def(
          "dlpack",
          [](const LowBlock& self, std::ptrdiff_t offset, std::pair<int, int> type, std::vector<std::int64_t> shape) {
            return dlpack_of(self.hold, self.receive + offset, self.hold->pool->device(), type, std::move(shape));
          },
          py::arg("offset"), py::arg("type"), py::arg("shape"));
  py::class_<Routing, std::shared_ptr<Routing>>(module, "Routing")
      .def_readonly("num_rows", &Routing::num_rows)
      .def_readonly("num_received", &Routing::num_received)
      .def_readonly("block_rows", &Routing::block_rows)
      .def_readonly("sent_rows", &Routing::sent_rows)
      .def_property_readonly("tokens_per_local_expert",
                             [](const Routing& self) {
                               const auto& rows = self.tokens_per_local_expert;
                               return py::bytearray(reinterpret_cast<const char*>(rows.data()),
                                                    rows.size() * sizeof(rows[0]));
                             })
      .def("set_fan", [](Routing& self, std::uintptr_t address) { self.fan = pointer<Entry>(address); });
  py::class_<DispatchResult>(module, "DispatchResult")
      .def_readonly("block", &DispatchResult::lease)
      .def_property_readonly("data",
                             [](const DispatchResult& self) { return reinterpret_cast<std::uintptr_t>(self.data); })
      .def_property_readonly("offsets", [](const DispatchResult& self) { return offsets_of(self.offsets); })
      .def_readonly("routing", &DispatchResult::routing)
      .def_property_readonly("bytes_per_row", [](const DispatchResult& self) {
        return std::size_t{self.sizes.row} + self.sizes.scale + self.sizes.weight + self.sizes.index;
      });
  py::class_<CombineResult>(module, "CombineResult")
      .def_readonly("staged", &CombineResult::staged)
      .def_readonly("bytes_to_peers", &CombineResult::bytes_to_peers);
  py::class_<Communicator>(module, "Communicator")
      .def(py::init(&connect), py::arg("heap"), py::kw_only(), py::arg("rank"), py::arg("peers"),
           py::arg("expert_to_rank"), py::arg("alignment"), py::arg("two_stage"), py::arg("max_tokens"),
           py::arg("timeout_s"), py::arg("default_sms"), py::arg("ranks_on_device"), py::arg("gpu_each"),
           py::arg("low_tokens"), py::arg("low_layout"), py::arg("mask_on_timeout"))
      .def("dispatch", &gpu::dispatch, py::kw_only(), py::arg("x"), py::arg("element"), py::arg("scales"),
           py::arg("num_tokens"), py::arg("hidden"), py::arg("topk_idx"), py::arg("topk"), py::arg("weights"),
           py::arg("layout"), py::arg("max_recv_rows"), py::arg("quantize"), py::arg("power_of_two"),
           py::arg("routing"), py::arg("routing_memory"), py::arg("num_sms"), py::arg("stream"), py::arg("home"))
      .def("expand", &gpu::expand, py::kw_only(), py::arg("staged"), py::arg("element"), py::arg("hidden"),
           py::arg("fresh"), py::arg("beside"), py::arg("block"), py::arg("num_sms"), py::arg("local_sms"),
           py::arg("stream"))
      .def(
          "stage_stream",
          [](const Communicator& self, int num_sms, int local_sms, std::size_t bytes) {
            return reinterpret_cast<std::uintptr_t>(self.stage_stream(num_sms, local_sms, bytes));
          },
          py::kw_only(), py::arg("num_sms"), py::arg("local_sms"), py::arg("bytes"))
      .def("expanded_offsets",
           [](const Communicator& self, const DispatchResult& staged) { return offsets_of(self.expanded(staged)); })
      .def("combine", &gpu::combine, py::kw_only(), py::arg("rows"), py::arg("element"), py::arg("hidden"),
           py::arg("routing"), py::arg("weights"), py::arg("values"), py::arg("out"), py::arg("values_out"),
           py::arg("num_sms"), py::arg("local_sms"), py::arg("stream"), py::arg("home"))
      .def(
          "lease",
          [](Communicator& self, std::size_t bytes, std::uintptr_t stream, std::uintptr_t home) {
            return self.lease(bytes, Streams{stream_of(stream), stream_of(home)});
          },
          py::arg("bytes"), py::kw_only(), py::arg("stream"), py::arg("home"))
      .def("copy",
           [](Communicator& self, std::uintptr_t to, std::uintptr_t from, std::size_t bytes, std::uintptr_t stream) {
             self.copy(pointer<void>(to), pointer<const void>(from), bytes, stream_of(stream));
           })
      .def("low_dispatch", &gpu::low_dispatch, py::kw_only(), py::arg("x"), py::arg("element"), py::arg("scales"),
           py::arg("num_tokens"), py::arg("hidden"), py::arg("topk_idx"), py::arg("topk"), py::arg("weights"),
           py::arg("quantize"), py::arg("power_of_two"), py::arg("routing_memory"), py::arg("index"),
           py::arg("receives"), py::arg("num_sms"), py::arg("stream"))
      .def(
          "low_receive",
          [](Communicator& self, std::uintptr_t routing_memory, std::int64_t num_tokens, std::int64_t topk, int index,
             std::uintptr_t stream) {
            self.low_receive(pointer<void>(routing_memory), num_tokens, topk, index, stream_of(stream));
          },
          py::kw_only(), py::arg("routing_memory"), py::arg("num_tokens"), py::arg("topk"), py::arg("index"),
          py::arg("stream"))
      .def("low_combine", &gpu::low_combine, py::kw_only(), py::arg("rows"), py::arg("element"), py::arg("num_tokens"),
           py::arg("hidden"), py::arg("topk_idx"), py::arg("topk"), py::arg("weights"), py::arg("quantize"),
           py::arg("power_of_two"), py::arg("routing_memory"), py::arg("index"), py::arg("out"), py::arg("lost"),
           py::arg("sends"), py::arg("receives"), py::arg("num_sms"), py::arg("stream"))
      .def(
          "low_block",
          [](Communicator& self, int index, std::uint32_t row, std::uint32_t scale, std::uint32_t weight,
             std::uint32_t index_bytes, std::uintptr_t stream) {
            return self.low_block(index, RowSizes{row, scale, weight, index_bytes}, stream_of(stream));
          },
          py::arg("index"), py::kw_only(), py::arg("row_bytes"), py::arg("scale_bytes"), py::arg("weight_bytes"),
          py::arg("index_bytes"), py::arg("stream"))
      .def("low_rows_address",
           [](Communicator& self, int index) { return reinterpret_cast<std::uintptr_t>(self.low_rows(index)); })
      .def("low_held", &Communicator::low_held, py::arg("index"))
      .def(
          "low_mask",
          [](Communicator& self, const std::vector<int>& ranks, std::uintptr_t stream) {
            self.low_mask(ranks, stream_of(stream));
          },
          py::arg("ranks"), py::kw_only(), py::arg("stream"))
      .def("low_masked", &Communicator::low_masked, py::call_guard<py::gil_scoped_release>())
      .def("note_rows",
           [](Communicator& self, std::uintptr_t rows) { return self.note_rows(pointer<const void>(rows)); })
      .def("forget_rows", &Communicator::forget_rows, py::kw_only(), py::arg("all"))
      .def("offer_rows", &offer_rows)
      .def("map_rows", &map_rows, py::arg("rank"), py::arg("offers"))
      .def("commit_rows", &Communicator::commit_rows, py::arg("indices"))
      .def("low_routing_bytes", &Communicator::low_routing_bytes, py::arg("num_tokens"), py::arg("topk"))
      .def("check", &Communicator::check, py::call_guard<py::gil_scoped_release>())
      .def("depart", &Communicator::depart, py::call_guard<py::gil_scoped_release>())
      .def("routing_bytes", [](const Communicator& self, std::int64_t num_tokens,
                               std::int64_t topk) { return RoutingView::bytes(self.routing_shape(num_tokens, topk)); })
      .def(
          "tune",
          [](Communicator& self, int send_warps, int chunk_bytes, int reduce_warps, int reduce_stages, int reduce_chunk,
             int reduce_rows, int gather_scales, int overlap_stages) {
            Pipeline send{};
            send.warps = send_warps;
            send.chunk_bytes = chunk_bytes;
            Pipeline reduce{};
            reduce.warps = reduce_warps;
            reduce.stages = reduce_stages;
            reduce.chunk_bytes = reduce_chunk;
            self.tune(send, reduce, reduce_rows, gather_scales, overlap_stages);
          },
          py::kw_only(), py::arg("send_warps") = 0, py::arg("chunk_bytes") = 0, py::arg("reduce_warps") = 0,
          py::arg("reduce_stages") = 0, py::arg("reduce_chunk") = 0, py::arg("reduce_rows") = 0,
          py::arg("gather_scales") = 0, py::arg("overlap_stages") = 0);
  module.attr("routing_header_bytes") = sizeof(RoutingHeader);
  module.attr("fan_bytes") = sizeof(Entry);
  module.def("device_uuid", &device_uuid, py::arg("device"));
  module.def("num_sms_of", &num_sms_of, py::arg("device"));
  module.attr("most_fp8_experts") = kMostUnitExperts;
  module.def("transpose_fp8_scales", &transpose_fp8_scales, py::kw_only(), py::arg("scales"), py::arg("row_stride"),
             py::arg("block_stride"), py::arg("num_blocks"), py::arg("rows_per_expert"), py::arg("out"),
             py::arg("device"), py::arg("stream"));
  module.def("quantize_fp8_columns", &quantize_fp8_columns, py::kw_only(), py::arg("data"), py::arg("hidden"),
             py::arg("scales"), py::arg("row_stride"), py::arg("block_stride"), py::arg("rows_per_expert"),
             py::arg("power_of_two"), py::arg("codes"), py::arg("column_scales"), py::arg("device"), py::arg("stream"));
}

}  // namespace moe_ep
