// Hands the op to PyTorch's MPS stream.
//
// PyTorch keeps one compute encoder open on the stream's command buffer, from one of its kernels to
// the next. So ours are encoded with that encoder, and whoever asks for the results ends it and
// commits. A stream and its encoder are touched inside the stream's serial queue only; the
// pipelines, which all streams share, under a lock.

#import <Foundation/Foundation.h>
#import <Metal/Metal.h>

#include <ATen/mps/MPSStream.h>
#include <c10/metal/error.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>

#include EMBEDDED_METALLIB_HEADER
#include "arguments.h"
#include "embedding_lookup.h"
#include "pixel_scaling.h"
#include "vision_interpolation.h"

namespace embedding_lookup {
namespace {

namespace metal = embedding_lookup_metal;

// What the shaders write is PyTorch's to read.
using TorchErrors = c10::metal::ErrorMessages;
using TorchError = c10::metal::ErrorMessage;
static_assert(sizeof(metal::ErrorMessage) == sizeof(TorchError) &&
              offsetof(metal::ErrorMessage, file) == offsetof(TorchError, file) &&
              offsetof(metal::ErrorMessage, function) == offsetof(TorchError, func) &&
              offsetof(metal::ErrorMessage, message) == offsetof(TorchError, message) &&
              offsetof(metal::ErrorMessage, line) == offsetof(TorchError, line));
static_assert(offsetof(TorchErrors, count) == 0 && sizeof(TorchErrors::count) == 4 &&
              offsetof(TorchErrors, msg) == 4 &&
              sizeof(TorchErrors::msg) == metal::kMaxErrors * sizeof(metal::ErrorMessage));

[[noreturn]] void fail(const std::string& what, NSError* error) {
  const char* reason = error != nil ? error.localizedDescription.UTF8String : "no reason given";
  throw std::runtime_error("fused_embedding_lookup failed: " + what + ": " + reason);
}

// The pipeline of the shader `name`, made once.
id<MTLComputePipelineState> pipeline(id<MTLDevice> device, const std::string& name) {
  static std::mutex mutex;
  static id<MTLLibrary> library = nil;
  static std::unordered_map<std::string, id<MTLComputePipelineState>> pipelines;
  const std::lock_guard<std::mutex> lock(mutex);
  id<MTLComputePipelineState>& pipeline = pipelines[name];
  if (pipeline != nil) return pipeline;
  NSError* error = nil;
  if (library == nil) library = EMBEDDED_METALLIB_NAMESPACE::createLibrary(device, &error);
  if (library == nil) fail("the Metal library can't be loaded", error);
  id<MTLFunction> function =
      [library newFunctionWithName:[NSString stringWithUTF8String:name.c_str()]];
  if (function == nil) fail("the Metal library has no function " + name, nil);
  id<MTLComputePipelineState> made = [device newComputePipelineStateWithFunction:function
                                                                           error:&error];
  [function release];
  if (made == nil) fail("no pipeline for the Metal function " + name, error);
  if (made.threadExecutionWidth != metal::kSimdWidth) {
    const auto width = static_cast<int>(made.threadExecutionWidth);
    [made release];
    fail("simdgroups of this GPU have " + std::to_string(width) + " threads, not 32", nil);
  }
  pipeline = made;
  return pipeline;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMaxGrid = std::numeric_limits<uint32_t>::max();

// Encodes launches, each a pipeline, its arguments and a dispatch.
class Encoder {
 public:
  explicit Encoder(at::mps::MPSStream* stream)
      : device_(stream->device()),
        encoder_(stream->commandEncoder()),
        errors_(stream->getErrorBuffer()) {}

  // Threads per threadgroup: whole simdgroups, as many as the pipeline allows and at most `wanted`.
  void use(const std::string& name, int64_t wanted) {
    id<MTLComputePipelineState> state = pipeline(device_, name);
    [encoder_ setComputePipelineState:state];
    const auto most = static_cast<int64_t>(state.maxTotalThreadsPerThreadgroup);
    const int64_t simdgroups =
        std::min(divide_up(wanted, metal::kSimdWidth),
                 std::min<int64_t>(most, metal::kMaxThreads) / metal::kSimdWidth);
    threads_ = static_cast<uint32_t>(simdgroups) * metal::kSimdWidth;
    bind(metal::kErrors, errors_, 0);
  }
  uint32_t simdgroups() const { return threads_ / metal::kSimdWidth; }

  template <typename Params>
  void set(metal::BufferIndex index, const Params& params) {
    [encoder_ setBytes:&params length:sizeof(params) atIndex:index];
  }
  // What PyTorch keeps as an MPS storage's address is its MTLBuffer.
  void bind(metal::BufferIndex index, const Operand& operand) {
    bind(index, (id<MTLBuffer>)operand.storage, operand.byte_offset);
  }
  // Metal wants every buffer of a shader bound, so `stand_in` is where one isn't read.
  void bind(metal::BufferIndex index, const Operand& operand, const Operand& stand_in) {
    bind(index, operand.present() ? operand : stand_in);
  }
  void set_threadgroup_memory(NSUInteger bytes) {
    [encoder_ setThreadgroupMemoryLength:bytes atIndex:0];
  }
  // Shaders number their threads in 32 bits. A grid that would have more has as many, and its
  // threadgroups take several turns.
  void dispatch(int64_t threadgroups) {
    [encoder_ dispatchThreadgroups:MTLSizeMake(std::min(threadgroups, kMaxGrid / threads_), 1, 1)
             threadsPerThreadgroup:MTLSizeMake(threads_, 1, 1)];
  }

 private:
  void bind(metal::BufferIndex index, id<MTLBuffer> buffer, int64_t byte_offset) {
    [encoder_ setBuffer:buffer offset:static_cast<NSUInteger>(byte_offset) atIndex:index];
  }

  id<MTLDevice> device_;
  id<MTLComputeCommandEncoder> encoder_;
  id<MTLBuffer> errors_;
  uint32_t threads_ = 0;
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
    case ScalarType::BFloat16:
      return "bfloat";
    default:
      check(false, "no Metal shader for ", torch::headeronly::toString(dtype));
      return {};
  }
}

// The shader that is named so, of the dtypes and with vectors of that width.
std::string shader_name(const char* function, std::initializer_list<std::string> dtypes,
                        int64_t width) {
  std::string name = function;
  for (const std::string& dtype : dtypes) name += "_" + dtype;
  return name + "_" + std::to_string(width);
}

// Whether vectors of the elements that begin at the operand's first plus multiples of the strides
// are aligned.
bool can_vectorise(const Operand& operand, const int64_t* strides, int num_strides) {
  constexpr int64_t kWidth = metal::kVectorWidth;
  if (!operand.present()) return true;
  return operand.byte_offset % (kWidth * element_size(operand.dtype)) == 0 &&
         std::all_of(strides, strides + num_strides,
                     [](int64_t stride) { return stride % kWidth == 0; });
}

bool can_vectorise_activation(const Lookup& lookup) {
  return lookup.num_columns % metal::kVectorWidth == 0 &&
         (!lookup.activation.present() || lookup.activation.last_stride == 1) &&
         can_vectorise(lookup.activation, lookup.activation.token_strides, lookup.num_token_dims);
}

// Counts have 32 bits, which is what Apple's GPUs compute with; offsets have 64.
constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

metal::Lookup shader_lookup(const Lookup& lookup) {
  static_assert(kMaxEntries == metal::kMaxEntries && kMaxTokenDims == metal::kMaxTokenDims);
  const int64_t max_tokens = kMaxCount / lookup.num_entries;
  check(lookup.num_tokens <= max_tokens, "position_ids must have at most ", max_tokens,
        " tokens on MPS, got ", lookup.num_tokens);
  check(lookup.num_columns <= kMaxCount, "table must have at most ", kMaxCount,
        " columns on MPS, got ", lookup.num_columns);
  metal::Lookup result{};
  result.num_tokens = static_cast<uint32_t>(lookup.num_tokens);
  result.num_token_dims = lookup.num_token_dims;
  for (int dim = 0; dim < lookup.num_token_dims; ++dim) {
    result.token_sizes[dim] = static_cast<uint32_t>(lookup.token_sizes[dim]);
    result.ids_strides[dim] = lookup.ids.token_strides[dim];
    result.weights_strides[dim] = lookup.weights.token_strides[dim];
    result.padding_strides[dim] = lookup.padding.token_strides[dim];
    result.activation_strides[dim] = lookup.activation.token_strides[dim];
  }
  result.ids_last_stride = lookup.ids.last_stride;
  result.weights_last_stride = lookup.weights.last_stride;
  result.activation_last_stride = lookup.activation.last_stride;
  result.padding_id = lookup.padding_id;
  result.num_rows = lookup.num_rows;
  result.num_entries = static_cast<uint32_t>(lookup.num_entries);
  result.num_columns = static_cast<uint32_t>(lookup.num_columns);
  result.ids_are_int64 = lookup.ids.dtype == ScalarType::Long;
  result.has_weights = lookup.weights.present();
  result.has_padding = lookup.padding.present();
  result.has_padding_id = lookup.has_padding_id;
  return result;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Forward.

void launch_forward(const Lookup& lookup, torch::stable::Device) {
  constexpr int64_t kThreads = 256;
  const metal::Lookup shader_params = shader_lookup(lookup);
  metal::Forward forward{};
  forward.table_entry_stride = lookup.table.entry_stride;
  forward.table_row_stride = lookup.table.row_stride;
  forward.embedding = lookup.embedding_dtype == ScalarType::Half       ? metal::kToHalf
                      : lookup.embedding_dtype == ScalarType::BFloat16 ? metal::kToBfloat
                                                                       : metal::kToFloat;
  const bool has_residual = lookup.activation.present();
  forward.has_residual = has_residual;
  const int64_t table_strides[] = {lookup.table.entry_stride, lookup.table.row_stride};
  const bool vectorise =
      can_vectorise_activation(lookup) && can_vectorise(lookup.table, table_strides, 2);
  const int64_t width = vectorise ? metal::kVectorWidth : 1;
  const bool copies = lookup.num_entries == 1 && !lookup.weights.present() && !has_residual &&
                      lookup.embedding_dtype == lookup.table.dtype;
  const ScalarType residual_dtype = has_residual ? lookup.activation.dtype : lookup.out.dtype;
  const std::string name =
      copies ? shader_name("lookup_copy", {element_size(lookup.out.dtype) == 4 ? "uint" : "ushort"},
                           width)
             : shader_name("lookup_forward",
                           {shader_dtype(lookup.table.dtype), shader_dtype(residual_dtype),
                            shader_dtype(lookup.out.dtype)},
                           width);

  on_stream([&](Encoder& encoder) {
    encoder.use(name, kThreads);
    encoder.set(metal::kLookup, shader_params);
    encoder.bind(metal::kIds, lookup.ids);
    encoder.bind(metal::kWeights, lookup.weights, lookup.ids);
    encoder.bind(metal::kPadding, lookup.padding, lookup.ids);
    encoder.set(metal::kForward, forward);
    encoder.bind(metal::kTable, lookup.table);
    encoder.bind(metal::kResidual, lookup.activation, lookup.ids);
    encoder.bind(metal::kOut, lookup.out);
    encoder.dispatch(divide_up(lookup.num_tokens, encoder.simdgroups()));
  });
}

// ---------------------------------------------------------------------------------------------
// Backward.

namespace {

// What the backward's launches hand on. Buffers that are let go stay PyTorch's own until the stream
// is done with them.
struct Workspace {
  Tensor order, pieces, num_pieces, partials, starts;
  Tensor addends[2], num_addends[2];  // merged from one into the other and back
};

Workspace make_workspace(const Lookup& lookup, const metal::Backward& params,
                         torch::stable::Device device) {
  const int64_t num_tiles = params.num_tiles;
  const int64_t tile_partials = params.tile_partials;
  auto make = [&](IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    return allocate("the backward's workspace", sizes, dtype, device);
  };
  auto make_addends = [&] {
    return make({num_tiles, metal::kTile, sizeof(metal::Addend)}, ScalarType::Byte);
  };
  Workspace workspace{make({num_tiles, metal::kTile, sizeof(uint16_t)}, ScalarType::Byte),
                      make({num_tiles, tile_partials, sizeof(metal::Piece)}, ScalarType::Byte),
                      make({num_tiles}, ScalarType::Int),
                      make({num_tiles, tile_partials, lookup.num_columns}, ScalarType::Float),
                      make({lookup.total_rows()}, ScalarType::Int),
                      {make_addends(), make_addends()},
                      {make({num_tiles}, ScalarType::Int), make({num_tiles}, ScalarType::Int)}};
  torch::stable::zero_(workspace.starts);
  return workspace;
}

// Runs so long that a token's partials take no more than an eighth of a float32 row, whatever K is;
// but no longer than a tile has tokens, so that of ids that are all the same each tile makes a
// partial.
int64_t min_run(int64_t num_entries) {
  static_assert(metal::kMinRun * metal::kTile <= metal::kPiece * metal::kPiece,
                "no run is longer than a piece, or there could be more pieces than runs");
  return std::min(metal::kMinRun * num_entries, metal::kTile / num_entries);
}

// Encodes the launches of one backward.
class BackwardEncoder {
 public:
  BackwardEncoder(Encoder& encoder, const Lookup& lookup, const metal::Lookup& shader_params,
                  const metal::Backward& params, const Workspace& workspace)
      : encoder_(encoder),
        lookup_(lookup),
        shader_params_(shader_params),
        params_(params),
        workspace_(workspace) {}

  void sort() {
    const int64_t entries = lookup_.num_tokens * lookup_.num_entries;
    encoder_.use("lookup_backward_sort", std::min<int64_t>(entries, metal::kMaxThreads));
    encoder_.set(metal::kLookup, shader_params_);
    encoder_.bind(metal::kIds, lookup_.ids);
    encoder_.bind(metal::kPadding, lookup_.padding, lookup_.ids);
    encoder_.set(metal::kBackward, params_);
    encoder_.bind(metal::kOrder, output(workspace_.order));
    encoder_.bind(metal::kPieces, output(workspace_.pieces));
    encoder_.bind(metal::kNumPieces, output(workspace_.num_pieces));
    encoder_.bind(metal::kAddends, output(workspace_.addends[0]));
    encoder_.bind(metal::kNumAddends, output(workspace_.num_addends[0]));
    encoder_.set_threadgroup_memory(metal::kSortMemory);
    encoder_.dispatch(params_.num_tiles);
  }

  // Until all addends are one sorted list.
  void merge() {
    for (params_.list_tiles = 1; params_.list_tiles < params_.num_tiles; params_.list_tiles *= 2) {
      encoder_.use("lookup_backward_merge", kListThreads);
      encoder_.set(metal::kBackward, params_);
      set_addends();
      list_ ^= 1;
      encoder_.bind(metal::kMerged, output(workspace_.addends[list_]));
      encoder_.bind(metal::kNumMerged, output(workspace_.num_addends[list_]));
      encoder_.dispatch(params_.num_tiles);
    }
    encoder_.use("lookup_backward_starts", kListThreads);
    set_addends();
    encoder_.bind(metal::kStarts, output(workspace_.starts));
    encoder_.dispatch(params_.num_tiles);
  }

  void sum_pieces(int64_t width) {
    use_columns(
        shader_name("lookup_backward_pieces", {shader_dtype(lookup_.activation.dtype)}, width),
        width);
    encoder_.bind(metal::kOrder, input(workspace_.order));
    encoder_.bind(metal::kPieces, input(workspace_.pieces));
    encoder_.bind(metal::kNumPieces, input(workspace_.num_pieces));
    encoder_.bind(metal::kPartials, output(workspace_.partials));
    encoder_.dispatch(int64_t{params_.num_tiles} * metal::kTileParts);
  }

  void sum_rows(int64_t width) {
    use_columns(
        shader_name("lookup_backward_rows",
                    {shader_dtype(lookup_.activation.dtype), shader_dtype(lookup_.table.dtype)},
                    width),
        width);
    encoder_.bind(metal::kGradTable, lookup_.table);
    set_addends();
    encoder_.bind(metal::kPartials, input(workspace_.partials), input(workspace_.starts));
    encoder_.bind(metal::kStarts, input(workspace_.starts));
    encoder_.dispatch(params_.total_rows);
  }

 private:
  static constexpr int64_t kListThreads = 256;
  static constexpr int64_t kColumnThreads = 256;
  // So those whose grids follow the tiles need take no turns.
  static constexpr int64_t kMaxTiles = kMaxCount / (metal::kTile - kMaxEntries) + 1;
  static_assert(kMaxTiles * metal::kMaxThreads <= kMaxGrid &&
                kMaxTiles * metal::kTileParts * kColumnThreads <= kMaxGrid);
  // And an addend's index numbers all partials and all entries.
  static_assert(kMaxTiles * (metal::kTile / metal::kMinRun) + kMaxCount <= kMaxGrid);

  // A shader whose simdgroups share the columns. They need be no more than there are blocks.
  void use_columns(const std::string& name, int64_t width) {
    const int64_t blocks = divide_up(lookup_.num_columns, width * metal::kSimdWidth);
    encoder_.use(name, std::min(blocks * metal::kSimdWidth, kColumnThreads));
    encoder_.set(metal::kLookup, shader_params_);
    encoder_.bind(metal::kWeights, lookup_.weights, input(workspace_.starts));
    encoder_.set(metal::kBackward, params_);
    encoder_.bind(metal::kGrad, lookup_.activation, input(workspace_.starts));
  }
  void set_addends() {
    const Operand starts = input(workspace_.starts);  // there are no addends without tokens
    encoder_.bind(metal::kAddends, input(workspace_.addends[list_]), starts);
    encoder_.bind(metal::kNumAddends, input(workspace_.num_addends[list_]), starts);
  }

  Encoder& encoder_;
  const Lookup& lookup_;
  const metal::Lookup& shader_params_;
  metal::Backward params_;
  const Workspace& workspace_;
  int list_ = 0;  // of the workspace's two, which holds the addends now
};

}  // namespace

void launch_backward(const Lookup& lookup, torch::stable::Device device) {
  static_assert(metal::kTile <= 1 << 16, "16 bits number a tile's entries");
  const metal::Lookup shader_params = shader_lookup(lookup);
  check(lookup.total_rows() <= kMaxCount, "table of shape [",
        lookup.rows_per_entry == 0 ? "" : std::to_string(lookup.num_entries) + ", ",
        lookup.num_rows, ", ", lookup.num_columns, "] is too large for the backward on MPS");
  const int64_t tile_entries = metal::kTile / lookup.num_entries * lookup.num_entries;
  const int64_t num_tiles = divide_up(lookup.num_tokens * lookup.num_entries, tile_entries);
  metal::Backward params{};
  params.rows_per_entry = static_cast<uint32_t>(lookup.rows_per_entry);
  params.total_rows = static_cast<uint32_t>(lookup.total_rows());
  params.num_tiles = static_cast<uint32_t>(num_tiles);
  params.tile_entries = static_cast<uint32_t>(tile_entries);
  params.min_run = static_cast<uint32_t>(min_run(lookup.num_entries));
  params.tile_partials = metal::kTile / params.min_run;
  const int64_t width = can_vectorise_activation(lookup) ? metal::kVectorWidth : 1;

  // Not in the stream's queue: PyTorch takes it for the zeros.
  const Workspace workspace = make_workspace(lookup, params, device);
  on_stream([&](Encoder& encoder) {
    BackwardEncoder backward(encoder, lookup, shader_params, params, workspace);
    if (num_tiles > 0) {
      backward.sort();
      backward.merge();
      backward.sum_pieces(width);
    }
    backward.sum_rows(width);
  });
}

// ---------------------------------------------------------------------------------------------
// Interpolation.

void launch_interpolation(const Interpolation& interpolation, torch::stable::Device) {
  constexpr int64_t kThreads = 256;
  check(interpolation.num_images <= kMaxCount, "grid_thw must have at most ", kMaxCount,
        " images on MPS, got ", interpolation.num_images);
  metal::Interpolation params{};
  std::copy_n(interpolation.grid_strides, 2, params.grid_strides);
  params.resampling = interpolation.resampling;
  params.num_images = static_cast<uint32_t>(interpolation.num_images);
  params.num_patches = static_cast<uint32_t>(interpolation.num_patches);
  params.grid_is_int64 = interpolation.grid_thw.dtype == ScalarType::Long;
  // With nothing to write, or no images, something has to be bound all the same.
  const Operand& stand_in =
      interpolation.grid_thw.present() ? interpolation.grid_thw : interpolation.ids;
  if (!stand_in.present()) return;  // no images and no patches
  on_stream([&](Encoder& encoder) {
    encoder.use(interpolation.bicubic ? "vision_interpolation_4" : "vision_interpolation_2",
                kThreads);
    encoder.set(metal::kInterpolation, params);
    encoder.bind(metal::kGrid, interpolation.grid_thw, stand_in);
    encoder.bind(metal::kPatchIds, interpolation.ids, stand_in);
    encoder.bind(metal::kPatchWeights, interpolation.weights, stand_in);
    const int64_t threads = int64_t{encoder.simdgroups()} * metal::kSimdWidth;
    encoder.dispatch(divide_up(interpolation.num_patches + 1, threads));
  });
}

// ---------------------------------------------------------------------------------------------
// Scaling.

void launch_scaling(const Scaling& scaling, torch::stable::Device) {
  constexpr int64_t kThreads = 256;
  const bool vectorise = scaling.count % metal::kVectorWidth == 0 &&
                         can_vectorise(scaling.pixels, nullptr, 0) &&
                         can_vectorise(scaling.out, nullptr, 0);
  const int64_t width = vectorise ? metal::kVectorWidth : 1;
  const metal::Scaling params{scaling.count / width};
  const std::string name = shader_name(
      "scale_pixels", {shader_dtype(scaling.pixels.dtype), shader_dtype(scaling.out.dtype)}, width);
  on_stream([&](Encoder& encoder) {
    encoder.use(name, kThreads);
    encoder.set(metal::kScaling, params);
    encoder.bind(metal::kPixels, scaling.pixels);
    encoder.bind(metal::kScaled, scaling.out);
    const int64_t threads = int64_t{encoder.simdgroups()} * metal::kSimdWidth;
    encoder.dispatch(divide_up(params.num_vectors, threads * metal::kScaledVectors));
  });
}

}  // namespace embedding_lookup
