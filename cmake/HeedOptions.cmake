# heed_options: the warnings, hardening and sanitizers that every target of this project is compiled with.
add_library(heed_options INTERFACE)
target_compile_options(heed_options INTERFACE -Wall -Wextra $<$<BOOL:${HEED_WERROR}>:-Werror>)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(heed_options INTERFACE -Wno-restrict)  # GCC 12 sees overlaps in std::string that are not there
endif()
if(HEED_SANITIZE)
  # Null pointers and objects that end too early are what AddressSanitizer finds too, in a shorter compilation.
  target_compile_options(heed_options INTERFACE -fsanitize=${HEED_SANITIZE} -fno-sanitize=null,object-size
                                                -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_link_options(heed_options INTERFACE -fsanitize=${HEED_SANITIZE})
else()
  # A symbol that is missing shows at link time, not when Python loads the library.
  target_link_options(heed_options INTERFACE LINKER:-z,defs)
endif()
