// Calls kernels without XLA, which would have to compile each call first. native/check.py uses it when it loads the
// library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

// native/check.py has the same declarations.
struct gptjax_buffer {
  int64_t dtype, rank, dimensions[8];
  void* data;
};
struct gptjax_option {
  const char* name;
  int64_t dtype;
  void* value;
};
struct gptjax_call {
  int64_t arguments, results, options, threads;
  gptjax_buffer* buffers;  // arguments, then results
  gptjax_option* option;   // in the order of their names
  char* message;           // 256 bytes for an error message
  int64_t most_helpers;    // result: largest number of threads, besides the calling one, for one piece of work
};

struct XLA_FFI_ExecutionContext {
  int64_t threads, helpers = 0, most_helpers = 0;
  std::vector<std::thread> running;
};
struct XLA_FFI_Error {
  std::string message;
};

namespace gptjax {

inline XLA_FFI_Error* CreateError(XLA_FFI_Error_Create_Args* args) { return new XLA_FFI_Error{args->message}; }
inline void GetErrorMessage(XLA_FFI_Error_GetMessage_Args* args) { args->message = args->error->message.c_str(); }
inline void DestroyError(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
inline XLA_FFI_Error* Schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->ctx->running.emplace_back(args->task, args->data);
  args->ctx->most_helpers = std::max(args->ctx->most_helpers, ++args->ctx->helpers);
  return nullptr;
}
inline XLA_FFI_Error* NumThreads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = args->ctx->threads;
  args->ctx->helpers = 0;  // a kernel asks for the number of threads before each piece of work
  return nullptr;
}

// Returns 0, or 1 with the kernel's error message.
inline int CallDirectly(XLA_FFI_Handler* kernel, gptjax_call& call) {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = CreateError;
  api.XLA_FFI_Error_GetMessage = GetErrorMessage;
  api.XLA_FFI_Error_Destroy = DestroyError;
  api.XLA_FFI_ThreadPool_Schedule = Schedule;
  api.XLA_FFI_ThreadPool_NumThreads = NumThreads;

  const int64_t count = call.arguments + call.results;
  std::vector<XLA_FFI_Buffer> buffers(count);
  std::vector<void*> pointers(count);
  for (int64_t i = 0; i < count; ++i) {
    gptjax_buffer& from = call.buffers[i];
    buffers[i] = {XLA_FFI_Buffer_STRUCT_SIZE, nullptr, static_cast<XLA_FFI_DataType>(from.dtype), from.data, from.rank,
                  from.dimensions};
    pointers[i] = &buffers[i];
  }
  std::vector<XLA_FFI_ArgType> argument_types(call.arguments, XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> result_types(call.results, XLA_FFI_RetType_BUFFER);
  std::vector<XLA_FFI_Scalar> scalars(call.options);
  std::vector<XLA_FFI_ByteSpan> names(call.options);
  std::vector<XLA_FFI_AttrType> option_types(call.options, XLA_FFI_AttrType_SCALAR);
  std::vector<XLA_FFI_ByteSpan*> name_pointers(call.options);
  std::vector<void*> option_pointers(call.options);
  for (int64_t i = 0; i < call.options; ++i) {
    const gptjax_option& from = call.option[i];
    scalars[i] = {static_cast<XLA_FFI_DataType>(from.dtype), from.value};
    names[i] = {from.name, std::strlen(from.name)};
    name_pointers[i] = &names[i];
    option_pointers[i] = &scalars[i];
  }

  XLA_FFI_ExecutionContext context{call.threads};
  XLA_FFI_CallFrame frame = {};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.ctx = &context;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, call.arguments, argument_types.data(), pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, call.results, result_types.data(), pointers.data() + call.arguments};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,           call.options, option_types.data(),
                 name_pointers.data(),      option_pointers.data()};
  XLA_FFI_Error* error = kernel(&frame);
  for (std::thread& thread : context.running) thread.join();
  call.most_helpers = context.most_helpers;
  if (!error) return 0;
  std::strncpy(call.message, error->message.c_str(), 255);
  delete error;
  return 1;
}

}  // namespace gptjax

extern "C" inline __attribute__((used)) int gptjax_call_directly(XLA_FFI_Handler* kernel, gptjax_call* call) {
  return gptjax::CallDirectly(kernel, *call);
}
