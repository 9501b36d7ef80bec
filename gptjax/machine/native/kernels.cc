// What gptjax/native/build.py makes into a library: kernels that XLA calls by name, see gptjax/ops/kernels.py.

#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "cached_attention.h"
#include "few_rows.h"
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

// Asks the system for the tiles of this process. Returns 2 where kernels use them, 1 where they need none, 0 where they
// are not given.
extern "C" int gptjax_prepare() {
#if defined(__AMX_BF16__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, arch/x86/include/asm/fpu/types.h of Linux
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 2 : 0;
#else
  return 1;
#endif
}

// A kernel's parameters are the arguments, the options and the results of its call, in this order.
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear, Linear);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_weight_gradient, WeightGradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp, Mlp);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp_gradient, MlpGradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm, LayerNorm);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm_gradient, LayerNormGradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention, Attention);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention_gradient, AttentionGradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy, CrossEntropy);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy_gradient, CrossEntropyGradient);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_lay_out, LayOut);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_few_rows, FewRows);
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cached_attention, CachedAttention);

}  // namespace gptjax
