/** @file rope_bf16.cu @brief RoPE in bf16. */

#include "rope.cuh"

CHATFLOW_DEFINE_ROPE(bf16, chatflow::Bf16)
