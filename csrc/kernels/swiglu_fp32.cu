/** @file swiglu_fp32.cu @brief SwiGLU in fp32. */

#include "swiglu.cuh"

CHATFLOW_DEFINE_SWIGLU(fp32, float)
