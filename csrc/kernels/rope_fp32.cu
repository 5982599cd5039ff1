/** @file rope_fp32.cu @brief RoPE in fp32. */

#include "rope.cuh"

CHATFLOW_DEFINE_ROPE(fp32, float)
