// The library that gptjax/machine/native/build.py compiles: kernels that XLA calls by name, see gptjax/ops/kernels.py.

#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "cached_attention.h"
#include "direct.h"
#include "small_batch.h"
#include "linear.h"
#include "loss.h"
#include "mlp.h"
#include "norm.h"

template <>
struct xla::ffi::CtxBinding<xla::ffi::ThreadPool> {
  using Ctx = ThreadPool;
};
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(gptjax::LinearOptions, StructMember<bool>("columns"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(gptjax::AttentionOptions, StructMember<int64_t>("window"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(gptjax::NormOptions, StructMember<float>("epsilon"));
XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(gptjax::LossOptions, StructMember<int64_t>("vocab_size"),
                                      StructMember<float>("smoothing"), StructMember<float>("z_loss"));

namespace gptjax {

// Requests AMX tiles for this process. Returns 1 if the kernels may use tiles. Returns 0 if they were compiled without
// tiles, or if they were compiled with tiles and the system denies them; then the kernels must not be used.
extern "C" int gptjax_prepare() {
#if defined(GPTJAX_TILES) && !defined(GPTJAX_TILES_HEADER)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, arch/x86/include/asm/fpu/types.h of Linux
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#elif defined(GPTJAX_TILES)
  return 1;
#else
  return 0;
#endif
}

// A kernel's parameters are the arguments, the options and the results of its call, in this order.
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear, Guarded<Linear>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_weight_gradient, Guarded<WeightGradient>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp, Guarded<Mlp>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp_gradient, Guarded<MlpGradient>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm, Guarded<LayerNorm>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm_gradient, Guarded<LayerNormGradient>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention, Guarded<Attention>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention_gradient, Guarded<AttentionGradient>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy, Guarded<CrossEntropy>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy_gradient, Guarded<CrossEntropyGradient>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_pack_weights, Guarded<PackWeights>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_small_batch_matmul, Guarded<SmallBatchMatmul>::Call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cached_attention, Guarded<CachedAttention>::Call);

}  // namespace gptjax
