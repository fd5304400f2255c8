// What the exports share: arguments as TVM-FFI passes them, and heed's errors as Python users expect them.
#pragma once

#include <dlpack/dlpack.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/tvm_ffi.h>

#include <exception>
#include <string_view>

#include "heed/heed.h"

namespace heed::ffi {

// Runs `body` and turns heed's errors into TVM-FFI errors of the kind that Python users expect.
template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const UnsupportedError& error) {
    TVMFFIErrorSetRaisedFromCStr("heed.UnsupportedError", error.what());
  } catch (const ValueError& error) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", error.what());
  } catch (const TypeError& error) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", error.what());
  } catch (const tvm::ffi::Error& error) {
    tvm::ffi::detail::SetSafeCallRaised(error);
  } catch (const std::exception& error) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", error.what());
  } catch (...) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "unknown exception");
  }
  return -1;
}

// The bytes of a string argument, without a copy.
std::string_view string_argument(const TVMFFIAny& argument, const char* name);

const DLTensor* tensor_argument(const TVMFFIAny& argument, std::string_view name);
bool is_on_cuda(const DLTensor& tensor);

// The view of a tensor argument. `expected` decides what 16 bits without a type stand for.
TensorView view_argument(const TVMFFIAny& argument, DType expected, std::string_view name);

}  // namespace heed::ffi
