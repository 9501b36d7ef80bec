// What gptjax/native/build.py makes into a library: kernels that XLA calls by name, see gptjax/ops/kernels.py.

#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"
#include "cached_attention.h"
#include "few_rows.h"
#include "linear.h"

namespace gptjax {

// Asks the kernel for the tiles of this process. Returns whether the other functions can be called.
extern "C" bool gptjax_prepare() {
#if defined(__AMX_BF16__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, arch/x86/include/asm/fpu/types.h of Linux
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear, Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Attr<bool>("columns")
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear_gelu, LinearGelu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Vector>()
                                  .Ret<Rows>()
                                  .Ret<Rows>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_linear_gelu_gradient, LinearGeluGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Rows>()
                                  .Ret<Rows>()
                                  .Ret<Rows>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_weight_gradient, WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Rows>()
                                  .Arg<Rows>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<Vector>()
                                  .Ret<Rows>());

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
                                  .Arg<Heads>()
                                  .Arg<Segments>()
                                  .Attr<int64_t>("window")
                                  .Ret<Heads>()
                                  .Ret<Sums>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(gptjax_attention_gradient, AttentionGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Heads>()
                                  .Arg<Segments>()
                                  .Arg<Heads>()
                                  .Arg<Sums>()
                                  .Arg<Heads>()
                                  .Attr<int64_t>("window")
                                  .Ret<Heads>());

}  // namespace gptjax
