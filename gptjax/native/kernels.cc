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

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<Vector>()          // bias
                                  .Arg<Stream>()          // onto
                                  .Attr<bool>("columns")
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<Packed>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_weight_gradient, WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()            // x
                                  .Arg<ffi::AnyBuffer>()            // dy
                                  .Ret<ffi::Buffer<ffi::F32>>()     // dw
                                  .Ret<Vector>()                    // sums
                                  .Ret<Packed>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp, Mlp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()         // x
                                  .Arg<ffi::AnyBuffer>()         // w_in
                                  .Arg<Vector>()                 // b_in
                                  .Arg<ffi::AnyBuffer>()         // w_out
                                  .Arg<Vector>()          // b_out
                                  .Arg<Stream>()          // onto
                                  .Ret<Stream>()          // y
                                  .Ret<Packed>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_mlp_gradient, MlpGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // w_in
                                  .Arg<Vector>()          // b_in
                                  .Arg<ffi::AnyBuffer>()  // w_out
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Attr<int64_t>("at_once")
                                  .Ret<ffi::AnyBuffer>()         // dx
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dw_in
                                  .Ret<Vector>()                 // db_in
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dw_out
                                  .Ret<Packed>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Vector>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_lay_out, LayOut,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cached_attention, CachedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR2<ffi::PRED>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // queries, keys and values
                                  .Arg<Segments>()
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::AnyBuffer>()  // y
                                  .Ret<Sums>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention_gradient, AttentionGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // queries, keys and values
                                  .Arg<Segments>()
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<Sums>()
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy, CrossEntropy,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // x
                                  .Arg<ffi::AnyBuffer>()           // w
                                  .Arg<ffi::BufferR1<ffi::S32>>()  // targets
                                  .Attr<int64_t>("vocab_size")
                                  .Attr<float>("smoothing")
                                  .Attr<float>("z_loss")
                                  .Ret<Vector>()  // log_z
                                  .Ret<Vector>()  // at_target
                                  .Ret<Vector>()  // total
                                  .Ret<Packed>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_cross_entropy_gradient, CrossEntropyGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // x
                                  .Arg<ffi::AnyBuffer>()           // w
                                  .Arg<ffi::BufferR1<ffi::S32>>()  // targets
                                  .Attr<int64_t>("vocab_size")
                                  .Attr<float>("smoothing")
                                  .Attr<float>("z_loss")
                                  .Ret<Vector>()  // log_z
                                  .Ret<Vector>()  // at_target
                                  .Ret<Vector>()  // total
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dx
                                  .Ret<ffi::Buffer<ffi::F32>>()  // dw
                                  .Ret<Packed>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm, LayerNorm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Stream>()  // x
                                  .Arg<Vector>()  // scale
                                  .Arg<Vector>()  // bias
                                  .Attr<float>("epsilon")
                                  .Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_layer_norm_gradient, LayerNormGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Stream>()          // x
                                  .Arg<Vector>()          // scale
                                  .Arg<ffi::AnyBuffer>()  // dy
                                  .Arg<Stream>()          // beside
                                  .Attr<float>("epsilon")
                                  .Ret<Stream>()   // dx
                                  .Ret<Vector>()   // dscale
                                  .Ret<Vector>());  // dbias

}  // namespace gptjax
