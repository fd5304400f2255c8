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

// The views of a tensor argument of any float dtype of heed's, and of one of int32. Throw TypeError for other dtypes.
TensorView float_argument(const TVMFFIAny& argument, std::string_view name);
TensorView index_argument(const TVMFFIAny& argument, std::string_view name);

// Whether an argument stands for nothing: None, or a tensor without elements whose last axis has size 0.
bool is_absent(const TVMFFIAny& argument);

// Scalars, as Python and XLA's attributes give them: an int may stand for a flag or a real.
int64_t integer_argument(const TVMFFIAny& argument, std::string_view name);
bool flag_argument(const TVMFFIAny& argument, std::string_view name);
double real_argument(const TVMFFIAny& argument, std::string_view name);

}  // namespace heed::ffi
