// Hands the op to PyTorch's MPS stream.
//
// PyTorch keeps one compute encoder open on the stream's command buffer, from one of its kernels to
// the next. So ours are encoded with that encoder, and whoever asks for the results ends it and
// commits. The stream, the encoder and the pipelines are touched inside the stream's serial queue
// only.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <unordered_map>

#include EMBEDDED_METALLIB_HEADER
#include "arguments.h"
#include "embedding_lookup.h"

namespace embedding_lookup {
namespace {

namespace metal = embedding_lookup_metal;

[[noreturn]] void fail(const std::string& what, NSError* error) {
  const char* reason = error != nil ? error.localizedDescription.UTF8String : "no reason given";
  throw std::runtime_error("fused_embedding_lookup: " + what + ": " + reason);
}

// The pipeline of the shader `name`, made once. In the stream's queue.
id<MTLComputePipelineState> pipeline(id<MTLDevice> device, const std::string& name) {
  static id<MTLLibrary> library = nil;
  static std::unordered_map<std::string, id<MTLComputePipelineState>> pipelines;
  id<MTLComputePipelineState>& pipeline = pipelines[name];
  if (pipeline != nil) return pipeline;
  NSError* error = nil;
  if (library == nil) library = EMBEDDED_METALLIB_NAMESPACE::createLibrary(device, &error);
  if (library == nil) fail("the Metal library can't be loaded", error);
  id<MTLFunction> function =
      [library newFunctionWithName:[NSString stringWithUTF8String:name.c_str()]];
  if (function == nil) fail("the Metal library has no function " + name, nil);
  pipeline = [device newComputePipelineStateWithFunction:function error:&error];
  [function release];
  if (pipeline == nil) fail("no pipeline for the Metal function " + name, error);
  return pipeline;
}

// Encodes launches, each a pipeline, its arguments and a dispatch.
class Encoder {
 public:
  explicit Encoder(at::mps::MPSStream* stream)
      : device_(stream->device()), encoder_(stream->commandEncoder()) {}

  // Threads per threadgroup that the pipeline allows, whole simdgroups and at most `wanted`.
  uint32_t use(const std::string& name, uint32_t wanted) {
    id<MTLComputePipelineState> state = pipeline(device_, name);
    [encoder_ setComputePipelineState:state];
    const auto most = static_cast<uint32_t>(state.maxTotalThreadsPerThreadgroup);
    return std::min(wanted, most / metal::kSimdWidth * metal::kSimdWidth);
  }
  template <typename Params>
  void set(metal::BufferIndex index, const Params& params) {
    [encoder_ setBytes:&params length:sizeof(params) atIndex:index];
  }
  void set_input(metal::BufferIndex index, const Tensor& tensor) {
    set_buffer(index, tensor, tensor.const_data_ptr());
  }
  void set_output(metal::BufferIndex index, const Tensor& tensor) {
    set_buffer(index, tensor, tensor.mutable_data_ptr());
  }
  // Metal wants every buffer of a shader bound, so that of the ids stands in for one that isn't
  // read.
  void set_input(metal::BufferIndex index, const std::optional<Tensor>& tensor, const Tensor& ids) {
    set_input(index, tensor ? *tensor : ids);
  }
  void set_threadgroup_memory(NSUInteger bytes) {
    [encoder_ setThreadgroupMemoryLength:bytes atIndex:0];
  }
  void dispatch(int64_t threadgroups, uint32_t threads) {
    [encoder_ dispatchThreadgroups:MTLSizeMake(threadgroups, 1, 1)
             threadsPerThreadgroup:MTLSizeMake(threads, 1, 1)];
  }

 private:
  // What PyTorch keeps as an MPS storage's address is its MTLBuffer.
  void set_buffer(metal::BufferIndex index, const Tensor& tensor, const void* data) {
    const NSUInteger offset = tensor.storage_offset() * tensor.element_size();
    id<MTLBuffer> buffer = (id<MTLBuffer>)(reinterpret_cast<uintptr_t>(data) - offset);
    [encoder_ setBuffer:buffer offset:offset atIndex:index];
  }

  id<MTLDevice> device_;
  id<MTLComputeCommandEncoder> encoder_;
};

// Calls encode(encoder) where the stream may be used. dispatch_sync lets no exception through.
template <typename Encode>
void on_stream(const Encode& encode) {
  at::mps::MPSStream* stream = at::mps::getCurrentMPSStream();
  std::exception_ptr failure;
  std::exception_ptr* caught = &failure;
  dispatch_sync(stream->queue(), ^{
    @autoreleasepool {
      try {
        Encoder encoder(stream);
        encode(encoder);
      } catch (...) {
        *caught = std::current_exception();
      }
    }
  });
  if (failure) std::rethrow_exception(failure);
}

// As in the shaders' names.
std::string shader_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float";
    case ScalarType::Half:
      return "half";
    default:
      return "bfloat";
  }
}

std::string shader_name(const char* function, ScalarType a, ScalarType b, bool vectorise) {
  const uint32_t width = vectorise ? metal::kVectorWidth : 1;
  return std::string(function) + "_" + shader_dtype(a) + "_" + shader_dtype(b) + "_" +
         std::to_string(width);
}

// Whether vectors of the elements that begin at the tensor's first plus multiples of the strides
// are aligned.
bool can_vectorise(const Tensor& tensor, std::initializer_list<int64_t> strides) {
  auto whole = [](int64_t elements) { return elements % metal::kVectorWidth == 0; };
  return whole(tensor.storage_offset()) && std::all_of(strides.begin(), strides.end(), whole);
}

bool can_vectorise_rows(const Lookup& lookup, const Tensor& rows, int64_t hidden_stride) {
  bool result = hidden_stride == 1 && can_vectorise(rows, {});
  for (int dim = 0; dim < lookup.num_token_dims; ++dim) {
    result = result && can_vectorise(rows, {lookup.rows_strides[dim]});
  }
  return result;
}

// Counts have 32 bits, which is what Apple's GPUs compute with; offsets have 64.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

metal::Lookup shader_lookup(const Lookup& lookup) {
  metal::Lookup result{};
  static_assert(kMaxAxes == metal::kMaxAxes && kMaxTokenDims == metal::kMaxTokenDims);
  check(lookup.num_tokens <= kMaxCount, "position_ids must have at most ", kMaxCount,
        " tokens on MPS, got ", lookup.num_tokens);
  check(lookup.hidden <= kMaxCount, "table must have at most ", kMaxCount, " columns on MPS, got ",
        lookup.hidden);
  result.num_tokens = static_cast<uint32_t>(lookup.num_tokens);
  result.num_token_dims = lookup.num_token_dims;
  for (int dim = 0; dim < lookup.num_token_dims; ++dim) {
    result.token_sizes[dim] = static_cast<uint32_t>(lookup.token_sizes[dim]);
    result.ids_strides[dim] = lookup.ids_strides[dim];
    result.padding_strides[dim] = lookup.padding_strides[dim];
    result.rows_strides[dim] = lookup.rows_strides[dim];
  }
  result.ids_axis_stride = lookup.ids_axis_stride;
  result.padding_id = lookup.padding_id;
  result.num_rows = lookup.num_rows;
  result.num_axes = static_cast<uint32_t>(lookup.num_axes);
  result.hidden = static_cast<uint32_t>(lookup.hidden);
  result.ids_are_int64 = lookup.ids_are_int64;
  result.has_padding = lookup.padding != nullptr;
  result.has_padding_id = lookup.has_padding_id;
  return result;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void launch_forward(const Forward& params, const ForwardTensors& tensors) {
  constexpr uint32_t kThreads = 256;
  const Lookup& lookup = params.lookup;
  const metal::Lookup shader_params = shader_lookup(lookup);
  metal::Forward forward{};
  forward.table_axis_stride = params.table_axis_stride;
  forward.table_row_stride = params.table_row_stride;
  forward.residual_hidden_stride = params.residual_hidden_stride;
  forward.has_residual = tensors.residual.has_value();
  const ScalarType residual_dtype = tensors.residual ? params.residual_dtype : params.table_dtype;
  const bool vectorise =
      lookup.hidden % metal::kVectorWidth == 0 &&
      can_vectorise(tensors.table, {params.table_axis_stride, params.table_row_stride}) &&
      (!tensors.residual ||
       can_vectorise_rows(lookup, *tensors.residual, params.residual_hidden_stride));

  on_stream([&](Encoder& encoder) {
    const uint32_t threads = encoder.use(
        shader_name("lookup_forward", params.table_dtype, residual_dtype, vectorise), kThreads);
    encoder.set(metal::kLookup, shader_params);
    encoder.set_input(metal::kIds, tensors.ids);
    encoder.set_input(metal::kPadding, tensors.padding, tensors.ids);
    encoder.set(metal::kForward, forward);
    encoder.set_input(metal::kTable, tensors.table);
    encoder.set_input(metal::kResidual, tensors.residual, tensors.ids);
    encoder.set_output(metal::kOut, tensors.out);
    encoder.dispatch(divide_up(lookup.num_tokens, threads / metal::kSimdWidth), threads);
  });
}

void launch_backward(const Backward& params, const BackwardTensors& tensors) {
  constexpr uint32_t kSortThreads = metal::kTile / 2;
  constexpr uint32_t kSumThreads = metal::kSumSimdgroups * metal::kSimdWidth;
  const Lookup& lookup = params.lookup;
  const metal::Lookup shader_params = shader_lookup(lookup);
  const int64_t num_tiles = divide_up(lookup.num_tokens, metal::kTile);
  const int64_t table_rows = lookup.num_axes * lookup.num_rows;
  check(table_rows <= kMaxCount, "table of shape [", lookup.num_axes, ", ", lookup.num_rows, ", ",
        lookup.hidden, "] is too large for the backward on MPS");
  if (num_tiles == 0) {
    Tensor grad_table = tensors.grad_table;
    torch::stable::zero_(grad_table);
    return;
  }
  metal::Backward backward{};
  backward.grad_hidden_stride = params.grad_hidden_stride;
  backward.num_tiles = static_cast<uint32_t>(num_tiles);
  const bool vectorise = lookup.hidden % metal::kVectorWidth == 0 &&
                         can_vectorise_rows(lookup, tensors.grad, params.grad_hidden_stride);

  // Not in the stream's queue: PyTorch takes it for the zeros.
  const Tensor segments =
      torch::stable::new_zeros(tensors.grad, {table_rows, num_tiles}, ScalarType::Short);
  const Tensor order = torch::stable::new_empty(
      tensors.grad, {num_tiles, lookup.num_axes, metal::kTile}, ScalarType::Int);
  on_stream([&](Encoder& encoder) {
    const uint32_t sort_threads = encoder.use("lookup_backward_sort", kSortThreads);
    encoder.set(metal::kLookup, shader_params);
    encoder.set_input(metal::kIds, tensors.ids);
    encoder.set_input(metal::kPadding, tensors.padding, tensors.ids);
    encoder.set_output(metal::kSegments, segments);
    encoder.set_output(metal::kOrder, order);
    encoder.set_threadgroup_memory(metal::kTile * sizeof(uint64_t));
    encoder.dispatch(num_tiles * lookup.num_axes, sort_threads);

    const std::string name =
        shader_name("lookup_backward_sum", params.grad_dtype, params.table_dtype, vectorise);
    const uint32_t sum_threads = encoder.use(name, kSumThreads);
    check(sum_threads == kSumThreads, "the Metal function ", name, " takes ", kSumThreads,
          " threads, this GPU allows ", sum_threads);
    encoder.set(metal::kLookup, shader_params);
    encoder.set_input(metal::kSegments, segments);
    encoder.set_input(metal::kOrder, order);
    encoder.set(metal::kBackward, backward);
    encoder.set_input(metal::kGrad, tensors.grad);
    encoder.set_output(metal::kGradTable, tensors.grad_table);
    encoder.set_threadgroup_memory(kSumThreads * metal::kVectorWidth * sizeof(float));
    encoder.dispatch(table_rows, sum_threads);
  });
}

}  // namespace embedding_lookup
