// The one macro of code that runs on the CPU and, compiled by NVRTC, on a GPU.
#pragma once

#ifdef __CUDACC__
#define HEED_HOST_DEVICE __host__ __device__
#else
#define HEED_HOST_DEVICE
#endif
