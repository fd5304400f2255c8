// The library's version, given by the build.
#include "heed/heed.h"

namespace heed {

const char* version() { return HEED_VERSION; }

}  // namespace heed
