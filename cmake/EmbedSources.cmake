# Device sources inside the library: NVRTC compiles them where heed runs.
#
# Included, it defines heed_embed_sources(OUT FILES...); run with `cmake -P`, it writes the table. Each source becomes a
# raw string literal with its path relative to ROOT and its SHA-256.
if(NOT CMAKE_SCRIPT_MODE_FILE)
  set(heed_embed_script ${CMAKE_CURRENT_LIST_FILE})
  function(heed_embed_sources out)
    list(SORT ARGN)
    list(JOIN ARGN "|" files)
    add_custom_command(
      OUTPUT ${out}
      COMMAND ${CMAKE_COMMAND} -DOUT=${out} -DROOT=${CMAKE_CURRENT_SOURCE_DIR}/src -DFILES=${files} -P ${heed_embed_script}
      DEPENDS ${ARGN} ${heed_embed_script}
      COMMENT "Embedding the device sources"
      VERBATIM)
  endfunction()
  return()
endif()

string(REPLACE "|" ";" FILES "${FILES}")
set(rows "")
foreach(file IN LISTS FILES)
  file(RELATIVE_PATH path ${ROOT} ${file})
  file(SHA256 ${file} hash)
  file(READ ${file} text)
  string(FIND "${text}" ")heed_source\"" found)
  if(NOT found EQUAL -1)
    message(FATAL_ERROR "${file} contains the end of the literal that is to hold it")
  endif()
  string(APPEND rows "    {\"${path}\",\n     R\"heed_source(${text})heed_source\",\n     \"${hash}\"},\n")
endforeach()
file(WRITE ${OUT} "// Generated from the device sources by cmake/EmbedSources.cmake.
#include \"cuda/jit/sources.h\"

namespace heed::cuda {
namespace {

constexpr EmbeddedSource kSources[] = {
${rows}};

}  // namespace

std::span<const EmbeddedSource> embedded_sources() { return kSources; }

}  // namespace heed::cuda
")
