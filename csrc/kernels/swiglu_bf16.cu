/** @file swiglu_bf16.cu @brief SwiGLU in bf16. */

#include "swiglu.cuh"

CHATFLOW_DEFINE_SWIGLU(bf16, chatflow::Bf16)
