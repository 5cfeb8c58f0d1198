// The third op on the CPU: a plain loop over the pixels, in blocks where the dtypes allow.
//
// No include guard: see kernels.h.

namespace embedding_lookup {
namespace CPU_CAPABILITY {
namespace {

// The part of `count` pixels that goes in blocks. Returns how many that is.
template <bool kStream, typename Pixel, typename Out>
int64_t scale_blocks(const Pixel* pixels, Out* out, int64_t count) {
  // bfloat16 is loaded in an order of its own.
  constexpr bool kSameOrder = std::is_same_v<Pixel, BFloat16> == std::is_same_v<Out, BFloat16>;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    Block block = Packed<Pixel>::load(pixels + i);
    block.first -= 0.5f;
    block.second -= 0.5f;
    block = Packed<Pixel>::round(block);
    block.scale(2);
    block = Packed<Pixel>::round(block);  // to infinity, perhaps
    if constexpr (kSameOrder) {
      Packed<Out>::template round_and_store<kStream>(out + i, block);
    } else {
      Packed<Out>::template round_and_store_in_order<kStream>(out + i, block);
    }
  }
  return i;
}

template <typename Pixel, typename Out>
void scale_range(const Pixel* pixels, Out* out, int64_t count, bool stream) {
  int64_t i = 0;
  if constexpr (Packed<Pixel>::kExists && Packed<Out>::kExists &&
                (std::is_same_v<Pixel, Out> || std::is_same_v<Pixel, float>)) {
    i = stream ? scale_blocks<true>(pixels, out, count) : scale_blocks<false>(pixels, out, count);
  }
  using Math = OpMath<Pixel>;
  for (; i < count; ++i) {
    const auto centred = static_cast<Pixel>(static_cast<Math>(pixels[i]) - Math(0.5));
    out[i] = static_cast<Out>(static_cast<Pixel>(Math(2) * static_cast<Math>(centred)));
  }
#if CPU_VECTOR_BYTES > 16
  if (stream) _mm_sfence();  // before other threads read the result
#endif
}

void scale(const Scaling& scaling, int64_t begin, int64_t end, bool stream) {
  visit(scaling.pixels.dtype, [&](auto* pixel) {
    using Pixel = std::remove_pointer_t<decltype(pixel)>;
    visit(scaling.out.dtype, [&](auto* out) {
      using Out = std::remove_pointer_t<decltype(out)>;
      scale_range(scaling.pixels.data<const Pixel>() + begin, scaling.out.data<Out>() + begin,
                  end - begin, stream);
    });
  });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace embedding_lookup
